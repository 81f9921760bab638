"""LER and PRC: the weights of proposals in unlabeled images, and the weighted losses.

Shapes:

    N: number of proposals
    K: number of foreground classes; class ``K`` is the background, last as in Detectron2

Gradients flow through the student's losses but never through the weights.
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
    """Compute the teacher's reliability scores for the student's proposals.

    For a foreground proposal, the score is the teacher's highest foreground probability times the
    localization quality of the box of that class (Eq. 12). For a background proposal, it is the
    teacher's background probability (Eq. 13).

    Args:
        probabilities: ``(N, K+1)`` the teacher's softmax probabilities.
        log_variance: ``(N, K, 4)`` the teacher's log-variances, or ``(N, 1, 4)`` if box regression
            is class-agnostic.
        labels: ``(N,)`` classes assigned to the proposals from the pseudo-labels, in ``[0, K]``.
        limit, scale: as in :func:`~locreweight.losses.localization.localization_quality`.

    Returns:
        ``(N,)`` scores in ``[0, 1]`` (if ``scale`` is at most 2), without gradient.

    Raises:
        ValueError: if the shapes are inconsistent.
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
    """Compute the unsupervised classification loss of PRC (Eq. 14).

    Args:
        logits: ``(N, K+1)`` the student's class scores before softmax.
        labels: ``(N,)`` assigned classes in ``[0, K]``.
        reliability: ``(N,)`` scores from :func:`proposal_reliability`.
        per_sampled_proposal: divide both sums by N, as Detectron2 does. By default the foreground
            sum is divided by the number of foreground proposals and the background sum by the
            number of background proposals, as in Eq. 14.

    Returns:
        Scalar: foreground mean plus background mean. The mean of an empty set is an exact zero that
        keeps the graph, so that every process of a distributed run takes part in the backward pass.

    Raises:
        ValueError: if ``reliability`` and ``labels`` have different shapes.
    """
    if reliability.shape != labels.shape:
        raise ValueError(f"reliability is {tuple(reliability.shape)}, labels {tuple(labels.shape)}")
    weighted = reliability.detach() * F.cross_entropy(
        at_least_float32(logits), labels, reduction="none"
    )
    foreground = labels < logits.shape[1] - 1
    if per_sampled_proposal:
        return weighted.sum() / max(len(labels), 1)
    # Indexing with the masks would make the host wait for the device.
    foreground_mean, background_mean = (
        (weighted * mask).sum() / mask.sum().clamp(min=1) for mask in (foreground, ~foreground)
    )
    return foreground_mean + background_mean


def quality_weighted_box_loss(loss: Tensor, quality: Tensor, normalizer: int | Tensor) -> Tensor:
    """Compute the unsupervised box loss of LER (Eq. 11).

    Args:
        loss: ``(N, 4)`` unreduced box losses of the foreground proposals.
        quality: ``(N,)`` localization quality of the pseudo-label matched to each proposal.
        normalizer: divisor of the summed loss, at least 1: the number of foreground proposals in
            Eq. 11, or of all sampled proposals.

    Returns:
        Scalar; an exact zero that keeps the graph if there are no foreground proposals.

    Raises:
        ValueError: if ``quality`` does not have one number for each row of ``loss``.
    """
    if quality.shape != loss.shape[:1]:
        raise ValueError(f"quality is {tuple(quality.shape)}, loss {tuple(loss.shape)}")
    weighted = at_least_float32(loss) * quality.detach()[:, None]
    if isinstance(normalizer, Tensor):
        return weighted.sum() / normalizer.clamp(min=1)
    return weighted.sum() / max(normalizer, 1)
