"""Match detections to ground truth and measure precision, recall and IoU.

Boxes are xyxy, absolute pixels. Detections and ground truth are in the same frame.

Shapes:

    N: detections
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.structures import Instances, pairwise_iou
from torch import Tensor

IOU_THRESHOLD = 0.5
QUARTERS = 4


@dataclass(frozen=True)
class Match:
    """Detections of one or several images, matched to ground truth.

    Attributes:
        index: ``(N,)`` index of the matched ground truth box of the image, -1 for none.
        iou: ``(N,)`` IoU with that box; 0 for none.
        quality: ``(N,)`` localization quality.
        num_ground_truth: number of ground truth boxes without crowd regions.
    """

    index: Tensor
    iou: Tensor
    quality: Tensor
    num_ground_truth: int

    @property
    def is_correct(self) -> Tensor:
        """``(N,)`` bool: whether the detection is matched."""
        return self.index >= 0


@dataclass(frozen=True)
class Agreement:
    """Agreement of detections with ground truth, in [0, 1]; NaN where the divisor is 0.

    Attributes:
        precision: fraction of the detections that are matched.
        recall: fraction of the ground truth that is matched.
        mean_iou: mean IoU of the matched detections.
    """

    precision: float
    recall: float
    mean_iou: float


def match(
    detections: Instances, ground_truth: Instances, threshold: float = IOU_THRESHOLD
) -> Match:
    """Match detections one to one to ground truth of the same class, highest score first.

    Unmatched detections that overlap a crowd region are dropped: they count neither as correct nor
    as wrong.

    Args:
        detections: ``pred_boxes``, ``pred_classes``, ``scores``, ``localization_quality``.
        ground_truth: ``gt_boxes``, ``gt_classes`` and ``gt_crowd`` (bool).
        threshold: smallest IoU of a match.
    """
    same_class = detections.pred_classes[:, None] == ground_truth.gt_classes[None]
    iou = pairwise_iou(detections.pred_boxes, ground_truth.gt_boxes) * same_class
    overlaps_crowd = (iou * ground_truth.gt_crowd >= threshold).any(dim=1)
    available = iou * ~ground_truth.gt_crowd
    index = torch.full((len(detections),), -1)
    matched_iou = torch.zeros(len(detections))
    for i in detections.scores.argsort(descending=True).tolist() if len(ground_truth) else []:
        best, j = available[i].max(dim=0)
        if best >= threshold:
            index[i], matched_iou[i] = j, best
            available[:, j] = 0
    counts = (index >= 0) | ~overlaps_crowd
    return Match(
        index[counts],
        matched_iou[counts],
        detections.localization_quality[counts],
        int((~ground_truth.gt_crowd).sum()),
    )


def join(matches: Sequence[Match]) -> Match:
    """Concatenate the matches of several images; each ``index`` still refers to its own image."""
    return Match(
        torch.cat([m.index for m in matches]),
        torch.cat([m.iou for m in matches]),
        torch.cat([m.quality for m in matches]),
        sum(m.num_ground_truth for m in matches),
    )


def agreement(matched: Match) -> Agreement:
    """Return precision, recall and mean IoU of all detections."""
    num_correct = int(matched.is_correct.sum())
    return Agreement(
        precision=_ratio(num_correct, len(matched.is_correct)),
        recall=_ratio(num_correct, matched.num_ground_truth),
        mean_iou=_ratio(float(matched.iou.sum()), num_correct),
    )


def agreement_by_quality(matched: Match) -> list[Agreement]:
    """Return the agreement of each quarter of the detections, lowest localization quality first.

    Each recall is relative to all ground truth: the recalls of the quarters add up to that of all.
    """
    order = matched.quality.argsort(stable=True)
    return [
        agreement(
            Match(matched.index[q], matched.iou[q], matched.quality[q], matched.num_ground_truth)
        )
        for q in order.tensor_split(QUARTERS)
    ]


def _ratio(numerator: float, denominator: int) -> float:
    return numerator / denominator if denominator else math.nan
