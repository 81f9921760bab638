"""Variance voting: average overlapping boxes by their predicted variances, after NMS.

He et al., "Bounding Box Regression with Uncertainty for Accurate Object Detection" (2019),
Algorithm 1. Here a box is also weighted by its score, and boxes with an IoU below 0.5 are ignored:
the box of a very small proposal has a very small variance in pixels, so it would dominate.

Shapes:

    N: number of detections of an image
    R: number of proposals of the image
    K: number of foreground classes
    C: K, or 1 if box regression is class-agnostic
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from detectron2.structures import Boxes
from torch import Tensor

MIN_IOU = 0.5  # a candidate is averaged if its IoU is at least this


class Candidates(NamedTuple):
    """All boxes that are predicted in an image, before NMS."""

    boxes: Tensor  # (R, C, 4) xyxy, absolute pixels
    variance: Tensor  # (R, C, 4) variances of the coordinates, squared pixels
    scores: Tensor  # (R, K) class probabilities


def vote(boxes: Boxes, classes: Tensor, candidates: Candidates, sigma: float) -> Boxes:
    """Replace the box of each detection by an average of the candidates that overlap it.

    The weight of a candidate's coordinate is ``score * exp(-(1 - IoU)^2 / sigma) / variance``, with
    its score for the class of the detection. Candidates with an IoU below :data:`MIN_IOU`, and
    those with a variance that is NaN or 0, have the weight 0.

    Args:
        boxes: N detected boxes, xyxy, absolute pixels.
        classes: ``(N,)`` their classes in ``[0, K)``.
        candidates: those of the same image and frame.
        sigma: above 0. With a smaller value, candidates that overlap less have a smaller weight.

    Returns:
        N boxes. A detection without such candidates stays unchanged.
    """
    per_class = candidates.boxes.shape[1] > 1
    columns = classes if per_class else torch.zeros_like(classes)
    others, variance = candidates.boxes[:, columns], candidates.variance[:, columns]  # (R, N, 4)
    iou = _iou(boxes.tensor, others)
    closeness = torch.exp(-((1 - iou) ** 2) / sigma) * (iou >= MIN_IOU)
    weight = (candidates.scores[:, classes] * closeness)[..., None] / variance
    weight = torch.where(weight.isfinite(), weight, torch.zeros_like(weight))
    total = weight.sum(dim=0)
    average = (weight * others).sum(dim=0) / total
    return Boxes(torch.where(total > 0, average, boxes.tensor))


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of ``(..., 4)`` boxes, xyxy, one by one; 0 if the union has no area.

    Detectron2's ``matched_pairwise_iou`` takes flat lists only, and ONNX cannot flatten no boxes.
    """
    size = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(0)
    intersection = size.prod(dim=-1)
    areas = [(x[..., 2:] - x[..., :2]).prod(dim=-1) for x in (a, b)]
    return (intersection / (areas[0] + areas[1] - intersection)).nan_to_num(0)
