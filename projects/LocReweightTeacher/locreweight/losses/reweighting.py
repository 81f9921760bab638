"""LER and PRC: how much each proposal of an unlabeled image counts in the student's losses.

Shapes:

    N: number of proposals
    K: number of foreground classes; class ``K`` is the background, last as in Detectron2
    C: K, or 1 when box regression is class-agnostic

"Student" losses take gradients; "teacher" weights never do.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .localization import LOG_VARIANCE_LIMIT, at_least_float32, localization_quality


@torch.no_grad()
def proposal_reliability(
    probabilities: Tensor,
    log_variance: Tensor,
    labels: Tensor,
    *,
    limit: float = LOG_VARIANCE_LIMIT,
    scale: float = 1.0,
) -> Tensor:
    """How reliable the teacher finds each of the student's proposals (Eq. 12 and 13).

    A proposal labeled foreground gets the teacher's highest foreground probability times the
    localization quality of the box of that class; one labeled background gets the teacher's
    background probability.

    Args:
        probabilities: ``(N, K+1)`` the teacher's softmax output.
        log_variance: ``(N, K, 4)``, or ``(N, 1, 4)`` if class-agnostic, the teacher's.
        labels: ``(N,)`` classes assigned to the proposals from the pseudo-labels, in ``[0, K]``.
        limit, scale: as in :func:`~locreweight.losses.localization.localization_quality`.

    Returns:
        ``(N,)`` weights in ``[0, 1]`` (for ``scale`` at most 2), without gradient.

    Raises:
        ValueError: if the shapes do not fit each other.
    """
    num_proposals, num_classes = probabilities.shape[0], probabilities.shape[1] - 1
    allowed = {(num_proposals, num_classes, 4), (num_proposals, 1, 4)}
    if tuple(log_variance.shape) not in allowed or tuple(labels.shape) != (num_proposals,):
        raise ValueError(
            f"for probabilities of shape {tuple(probabilities.shape)}, log_variance must be (N, K, "
            f"4) or (N, 1, 4) and labels (N,), got {tuple(log_variance.shape)} and "
            f"{tuple(labels.shape)}"
        )
    probabilities = at_least_float32(probabilities)
    foreground, best_class = probabilities[:, :num_classes].max(dim=1)
    column = best_class if log_variance.shape[1] == num_classes else torch.zeros_like(best_class)
    best_log_variance = log_variance[torch.arange(num_proposals, device=column.device), column]
    quality = localization_quality(best_log_variance, limit=limit, scale=scale)
    return torch.where(labels < num_classes, foreground * quality, probabilities[:, num_classes])


def reliability_weighted_cross_entropy(
    logits: Tensor, labels: Tensor, reliability: Tensor, *, per_sampled_proposal: bool = False
) -> Tensor:
    """The student's unsupervised classification loss (Eq. 14).

    Args:
        logits: ``(N, K+1)`` the student's class scores before softmax.
        labels: ``(N,)`` assigned classes in ``[0, K]``.
        reliability: ``(N,)`` weights from :func:`proposal_reliability`.
        per_sampled_proposal: divide both sums by N, as Detectron2 normalizes, and not, as the
            equation does, each by the number of its own proposals.

    Returns:
        Scalar: foreground mean plus background mean. The mean of an empty set is an exact zero that
        keeps the graph, so that every process of a distributed run takes part in the backward pass.

    Raises:
        ValueError: if ``reliability`` is not of the shape of ``labels``.
    """
    if reliability.shape != labels.shape:
        raise ValueError(f"reliability is {tuple(reliability.shape)}, labels {tuple(labels.shape)}")
    weighted = reliability.detach() * F.cross_entropy(
        at_least_float32(logits), labels, reduction="none"
    )
    foreground = labels < logits.shape[1] - 1
    if per_sampled_proposal:
        return weighted.sum() / max(len(labels), 1)
    # Sums over masks, not over selected rows: selecting would wait for the device.
    means = [
        (weighted * chosen).sum() / chosen.sum().clamp(min=1)
        for chosen in (foreground, ~foreground)
    ]
    return means[0] + means[1]


def quality_weighted_box_loss(
    loss: Tensor, quality: Tensor, num_foreground: int | Tensor
) -> Tensor:
    """The student's unsupervised box loss (Eq. 11, LER).

    Args:
        loss: ``(N, 4)`` unreduced box losses of the foreground proposals.
        quality: ``(N,)`` localization quality of the pseudo-label that each of them is matched to.
        num_foreground: what the sum is divided by (at least 1): the number of foreground proposals.

    Returns:
        Scalar; an exact zero that keeps the graph when there is no foreground proposal.

    Raises:
        ValueError: if ``quality`` is not one number for each row of ``loss``.
    """
    if quality.shape != loss.shape[:1]:
        raise ValueError(f"quality is {tuple(quality.shape)}, loss {tuple(loss.shape)}")
    weighted = at_least_float32(loss) * quality.detach()[:, None]
    if isinstance(num_foreground, Tensor):
        return weighted.sum() / num_foreground.clamp(min=1)
    return weighted.sum() / max(num_foreground, 1)
