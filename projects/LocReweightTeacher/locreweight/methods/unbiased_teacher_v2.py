"""Unbiased Teacher v2: regress to coordinates of which the teacher is more certain.

Liu et al., "Unbiased Teacher v2: Semi-supervised Object Detection for Anchor-free and Anchor-based
Detectors" (2022), "Listen2Student". The classification loss and the augmentations are those of
Unbiased Teacher. The student regresses to a coordinate of a pseudo-label only if the teacher is
certain of this coordinate, and more certain than the student. ``SEMI.RPN_BOX_LOSS False`` is set as
in Unbiased Teacher.

The certainty of a coordinate is computed by :func:`.certainty.certainty`.

Differences from the authors' code (Faster R-CNN):

- The variances are trained with the KL loss of this project. There the sigmoid of the predicted
  number is a standard deviation, and labeled boxes have an L1 loss plus 0.05 times a Gaussian
  likelihood.
- The box loss on pseudo-labels is smooth L1, and is multiplied by ``SEMI.UNSUPERVISED_WEIGHT`` as
  all others. There it is L1 with a weight of 1.
- Box regression is per class (``MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG``). There one regressor is
  used for all classes.
- The other differences are those of :mod:`.unbiased_teacher`.
"""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.structures import Instances
from torch import Tensor

from .base import METHOD_REGISTRY, LabelingInputs, SampledProposals, SemiSupervisedMethod
from .certainty import (
    certainty,
    check_predicts_certainty,
    matched_certainty,
    to_labels_with_certainty,
)


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
        check_predicts_certainty(cfg)
        return super().from_config(cfg)

    def select_pseudo_labels(self, inputs: LabelingInputs) -> list[Instances]:
        """Add ``gt_certainty``, ``(P, 4)``, in the order of the corners in the strong view."""
        return to_labels_with_certainty(inputs, self.pseudo_label_threshold)

    def box_loss(self, proposals: SampledProposals) -> Tensor:
        foreground = proposals.foreground
        teacher = matched_certainty(proposals)[foreground.rows]
        student = certainty(foreground.log_variance.detach())
        listens = (teacher > self.min_certainty) & (teacher > student + self.margin)
        proposals.metrics["proposals/coordinates_with_box_loss"] = listens.float().mean()
        return (proposals.smooth_l1_box_loss() * listens).sum() / foreground.normalizer
