"""Certainty of box coordinates: computed by the teacher, and carried to the student's proposals."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.layers import cat
from detectron2.structures import Instances
from torch import Tensor

from ..data.transforms.views import UnlabeledSample
from ..errors import UsageError
from ..geometry import between_views
from .base import LabelingInputs, SampledProposals, to_pseudo_labels


def check_predicts_certainty(cfg: CfgNode) -> None:
    """Check that the detector of a config predicts variances of box corners.

    Raises:
        UsageError: if it does not.
    """
    for key in ("GAUSSIAN_BOXES", "CORNER_CODING"):
        if not cfg.MODEL.ROI_BOX_HEAD[key]:
            raise UsageError(
                f"SEMI.METHOD {cfg.SEMI.METHOD} uses the certainty of box corners; set "
                f"MODEL.ROI_BOX_HEAD.{key} True"
            )


def certainty(log_variance: Tensor) -> Tensor:
    """Compute the certainty ``1 / (1 + variance)`` of predicted coordinates.

    Args:
        log_variance: of any shape, in the scaled units of the box coding.

    Returns:
        values in (0, 1) of the same shape.
    """
    return torch.sigmoid(-log_variance)


def to_labels_with_certainty(inputs: LabelingInputs, score_threshold: float) -> list[Instances]:
    """Convert the detections above a score threshold to pseudo-labels with their certainty.

    Args:
        inputs: the detections and the views of N images.
        score_threshold: threshold on the class probability.

    Returns:
        N ``Instances`` as those of :func:`.base.to_pseudo_labels`, in the frame of the weak view.
        The further field ``gt_certainty`` is ``(P, 4)`` for P labels, in the order x1, y1, x2, y2
        of the **strong** view.
    """
    return [
        to_pseudo_labels(
            x, score_threshold, gt_certainty=certainty(reorder_corners(x.log_variance, sample))
        )
        for x, sample in zip(inputs.output.detections, inputs.samples, strict=True)
    ]


def reorder_corners(values: Tensor, sample: UnlabeledSample) -> Tensor:
    """Reorder values of box corners from the weak to the strong view.

    In a flipped image, the left side of a box is the right side of the box in the other view.
    Rotations and shears of less than 45 degrees do not change the order; larger ones are not
    considered.

    Args:
        values: ``(P, 4)`` numbers of P boxes that belong to x1, y1, x2, y2 in the weak view.
        sample: the views.

    Returns:
        ``(P, 4)`` numbers that belong to x1, y1, x2, y2 in the strong view.
    """
    matrix = between_views(sample.weak.matrix, sample.strong.matrix)
    order = [0, 1, 2, 3]
    for axis in range(2):
        if matrix[axis, axis] < 0:
            order[axis], order[axis + 2] = order[axis + 2], order[axis]
    return torch.stack([values[:, i] for i in order], dim=1)


def matched_certainty(proposals: SampledProposals) -> Tensor:
    """Return ``gt_certainty`` of the pseudo-label that each proposal is matched to.

    Returns:
        ``(R, 4)`` for R sampled proposals, in the order x1, y1, x2, y2 of the student's image; 0 in
        images without pseudo-labels, and without meaning for background proposals.
    """
    return cat(
        [
            x.gt_certainty if x.has("gt_certainty") else torch.zeros_like(x.proposal_boxes.tensor)
            for x in proposals.instances
        ]
    )
