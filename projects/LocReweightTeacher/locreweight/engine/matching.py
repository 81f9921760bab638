"""Detections against the truth: which of them are right, and how well they are localized.

Boxes are xyxy in absolute pixels of one frame.

Shapes:

    N: detections of one image
    G: boxes of its ground truth
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
    """How the detections of one image (or, joined, of several) fare against the truth.

    Attributes:
        truth: ``(N,)`` index of the truth box that a detection found, -1 for none.
        iou: ``(N,)`` IoU with that box; 0 for none.
        quality: ``(N,)`` localization quality.
        num_truth: number of boxes that there were to be found.
    """

    truth: Tensor
    iou: Tensor
    quality: Tensor
    num_truth: int

    @property
    def right(self) -> Tensor:
        """``(N,)`` whether the detection found a box."""
        return self.truth >= 0


@dataclass(frozen=True)
class Agreement:
    """Of a set of detections: in [0, 1], NaN where there is nothing to divide by.

    Attributes:
        precision: share of the detections that are right.
        recall: share of the truth that they found.
        mean_iou: of the right ones with the boxes they found.
    """

    precision: float
    recall: float
    mean_iou: float


def match(found: Instances, truth: Instances, threshold: float = IOU_THRESHOLD) -> Match:
    """Pair detections and truth of the same class one to one, the highest score first.

    Detections that found nothing but overlap a crowd region are left out: they are neither right
    nor wrong.

    Args:
        found: ``pred_boxes``, ``pred_classes``, ``scores``, ``localization_quality``.
        truth: ``gt_boxes``, ``gt_classes`` and ``gt_crowd`` (bool), in the frame of ``found``.
        threshold: least IoU of a pair.
    """
    same_class = found.pred_classes[:, None] == truth.gt_classes[None]
    iou = pairwise_iou(found.pred_boxes, truth.gt_boxes) * same_class
    overlaps_crowd = (iou * truth.gt_crowd >= threshold).any(dim=1)
    free = iou * ~truth.gt_crowd
    partner = torch.full((len(found),), -1)
    pair_iou = torch.zeros(len(found))
    for i in found.scores.argsort(descending=True).tolist() if len(truth) else []:
        best, j = free[i].max(dim=0)
        if best >= threshold:
            partner[i], pair_iou[i] = j, best
            free[:, j] = 0
    counted = (partner >= 0) | ~overlaps_crowd
    return Match(
        partner[counted],
        pair_iou[counted],
        found.localization_quality[counted],
        int((~truth.gt_crowd).sum()),
    )


def join(matches: Sequence[Match]) -> Match:
    """Those of several images as one; indices into the truth are of each image's own."""
    return Match(
        torch.cat([m.truth for m in matches]),
        torch.cat([m.iou for m in matches]),
        torch.cat([m.quality for m in matches]),
        sum(m.num_truth for m in matches),
    )


def agreement(matched: Match) -> Agreement:
    """Precision, recall and mean IoU of all detections together."""
    right = int(matched.right.sum())
    return Agreement(
        precision=_ratio(right, len(matched.right)),
        recall=_ratio(right, matched.num_truth),
        mean_iou=_ratio(float(matched.iou.sum()), right),
    )


def agreement_by_quality(matched: Match) -> list[Agreement]:
    """The same of each quarter of the detections, from the lowest localization quality upwards.

    The recalls of the quarters add up to that of all.
    """
    order = matched.quality.argsort(stable=True)
    return [
        agreement(Match(matched.truth[q], matched.iou[q], matched.quality[q], matched.num_truth))
        for q in order.tensor_split(QUARTERS)
    ]


def _ratio(part: float, whole: int) -> float:
    return part / whole if whole else math.nan
