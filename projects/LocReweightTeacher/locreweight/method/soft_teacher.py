"""How Soft Teacher weights pseudo-labels, for comparison.

Xu et al., "End-to-End Semi-Supervised Object Detection with Soft Teacher" (2021), Sec. 3.2 and 3.3.

Shapes:

    N: number of proposals
    P: number of pseudo-labels
    J: number of jittered copies of each
    K: number of foreground classes; class ``K`` is the background
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .localization import at_least_float32


def background_weighted_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    background_score: Tensor,
    *,
    per_sampled_proposal: bool = False,
) -> Tensor:
    """Unsupervised classification loss (Sec. 3.2 there): foreground mean plus weighted background.

    A background proposal weighs its share of the teacher's background scores: one that the teacher
    takes for an object which the pseudo-labels lack hardly counts.

    Args:
        logits: ``(N, K+1)`` the student's class scores before softmax.
        labels: ``(N,)`` assigned classes in ``[0, K]``.
        background_score: ``(N,)`` the teacher's background probability of each proposal.
        per_sampled_proposal: divide the whole sum by all weights together, those of foreground
            being 1, as the authors' program does, and not each part by its own. The equal say that
            foreground has otherwise can drown a weak detector in false objects.

    Returns:
        Scalar; the part of an empty set is an exact zero that keeps the graph.
    """
    loss = F.cross_entropy(at_least_float32(logits), labels, reduction="none")
    foreground = labels < logits.shape[1] - 1
    score = torch.where(foreground, 0, at_least_float32(background_score.detach()))
    if per_sampled_proposal:
        weight = score + foreground
        return (weight * loss).sum() / weight.sum().clamp(min=1)
    weight = score / score.sum().clamp(min=torch.finfo(score.dtype).tiny)
    foreground_mean = (loss * foreground).sum() / foreground.sum().clamp(min=1)
    return foreground_mean + (weight * loss).sum()


def jittered(boxes: Tensor, copies: int, scale: float) -> Tensor:
    """Copies of boxes, each coordinate moved by up to ``scale`` of the box's width or height.

    Args:
        boxes: ``(P, 4)`` xyxy in absolute pixels of any view.
        copies: J.
        scale: largest share; the moves are drawn uniformly from torch's generator.

    Returns:
        ``(P, J, 4)`` xyxy in the same frame; may reach over its border.
    """
    size = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)[:, None]
    moves = torch.rand(len(boxes), copies, 4, device=boxes.device, dtype=boxes.dtype) * 2 - 1
    return boxes[:, None] + scale * size * moves


def box_regression_variance(boxes: Tensor, refined: Tensor) -> Tensor:
    """How far re-predictions from jittered boxes disagree (Sec. 3.3 there).

    Args:
        boxes: ``(P, 4)`` pseudo-labels, xyxy in absolute pixels.
        refined: ``(P, J, 4)`` what the teacher regresses their jittered copies to; J at least 2.

    Returns:
        ``(P,)`` mean over the coordinates of the standard deviation among the J, in units of half
        of the box's width plus height.
    """
    width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(dim=1)
    unit = 0.5 * (width + height)
    # Written out: torch's std warns where there is no box.
    squared = (refined - refined.mean(dim=1, keepdim=True)).square()
    deviation = (squared.sum(dim=1) / (refined.shape[1] - 1)).sqrt()
    return deviation.mean(dim=1) / unit.clamp(min=torch.finfo(unit.dtype).tiny)
