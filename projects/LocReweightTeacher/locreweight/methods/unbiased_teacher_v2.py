"""Unbiased Teacher v2: regress to coordinates of which the teacher is more certain.

Liu et al., "Unbiased Teacher v2: Semi-supervised Object Detection for Anchor-free and Anchor-based
Detectors" (2022), "Listen2Student". The classification loss and the augmentations are those of
Unbiased Teacher. The student regresses to a coordinate of a pseudo-label only if the teacher is
certain of this coordinate, and more certain than the student. ``SEMI.RPN_BOX_LOSS False`` is set as
in Unbiased Teacher.

The certainty of a coordinate is ``1 - sigmoid(s) = 1 / (1 + variance)``, where ``s`` is the
predicted log-variance.

Differences from the authors' code (Faster R-CNN):

- The variances are trained with the KL loss of this project. There ``sigmoid(s)`` is a standard
  deviation, and labeled boxes have an L1 loss plus 0.05 times a Gaussian likelihood.
- The box loss on pseudo-labels is smooth L1, and is multiplied by ``SEMI.UNSUPERVISED_WEIGHT`` as
  all others. There it is L1 with a weight of 1.
- Box regression is per class (``MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG``). There one regressor is
  used for all classes.
- The other differences are those of :mod:`.unbiased_teacher`.
"""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.layers import cat
from detectron2.structures import Instances
from torch import Tensor

from ..data.transforms.views import UnlabeledSample
from ..errors import UsageError
from ..geometry import between_views
from .base import METHOD_REGISTRY, LabelingInputs, SampledProposals, SemiSupervisedMethod


@METHOD_REGISTRY.register()
class UnbiasedTeacherV2(SemiSupervisedMethod):
    """Unbiased Teacher v2 with the values of the authors' Faster R-CNN.

    Attributes:
        min_certainty: the teacher is certain of a coordinate if its certainty is above this. The
            authors use 0.8 for FCOS.
        margin: by how much the teacher's certainty has to exceed the student's.
    """

    min_certainty: float = 0.5
    margin: float = 0.1

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        for key in ("GAUSSIAN_BOXES", "CORNER_CODING"):
            if not cfg.MODEL.ROI_BOX_HEAD[key]:
                raise UsageError(
                    f"SEMI.METHOD {cls.__name__} compares the certainty of box corners; set "
                    f"MODEL.ROI_BOX_HEAD.{key} True"
                )
        return super().from_config(cfg)

    def select_pseudo_labels(self, inputs: LabelingInputs) -> list[Instances]:
        """Add ``gt_certainty``, ``(P, 4)``, in the order of the corners in the strong view."""
        labels = super().select_pseudo_labels(inputs)
        for x, detections, sample in zip(
            labels, inputs.output.detections, inputs.samples, strict=True
        ):
            is_label = detections.scores > self.pseudo_label_threshold
            log_variance = detections.log_variance[is_label.nonzero().squeeze(1)]
            x.gt_certainty = certainty(reorder_corners(log_variance, sample))
        return labels

    def box_loss(self, proposals: SampledProposals) -> Tensor:
        foreground = proposals.foreground
        teacher = _matched_certainty(proposals)[foreground.rows]
        student = certainty(foreground.log_variance.detach())
        listens = (teacher > self.min_certainty) & (teacher > student + self.margin)
        proposals.metrics["proposals/coordinates_with_box_loss"] = listens.float().mean()
        return (proposals.smooth_l1_box_loss() * listens).sum() / foreground.normalizer


def certainty(log_variance: Tensor) -> Tensor:
    """Compute the certainty of predicted coordinates, in (0, 1), from their log-variances."""
    return torch.sigmoid(-log_variance)


def reorder_corners(values: Tensor, sample: UnlabeledSample) -> Tensor:
    """Reorder values of box corners from the weak to the strong view.

    In a flipped image, the left side of a box is the right side of the box in the other view.

    Args:
        values: ``(P, 4)`` numbers that belong to x1, y1, x2, y2 in the weak view.
        sample: the views.
    """
    matrix = between_views(sample.weak.matrix, sample.strong.matrix)
    order = [0, 1, 2, 3]
    for axis in range(2):
        if matrix[axis, axis] < 0:
            order[axis], order[axis + 2] = order[axis + 2], order[axis]
    return torch.stack([values[:, i] for i in order], dim=1)


def _matched_certainty(proposals: SampledProposals) -> Tensor:
    """``(R, 4)`` certainty of the matched pseudo-label; 0 in images without pseudo-labels."""
    return cat(
        [
            x.gt_certainty if x.has("gt_certainty") else torch.zeros_like(x.proposal_boxes.tensor)
            for x in proposals.instances
        ]
    )
