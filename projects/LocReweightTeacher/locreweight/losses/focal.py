"""Focal loss over classes and background, used by Unbiased Teacher (not in the paper).

Shapes:

    N: number of proposals
    K: number of foreground classes; class ``K`` is the background
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .localization import at_least_float32


def focal_cross_entropy(
    logits: Tensor, labels: Tensor, *, gamma: float, weight: Tensor | None = None
) -> Tensor:
    """Compute ``mean((1 - p)^gamma * -log p)`` for the probability ``p`` of the assigned class.

    This is the focal loss of Lin et al. (2017) with a softmax, as in Liu et al., "Unbiased Teacher
    for Semi-Supervised Object Detection" (2021), Sec. 3.4. It reduces the weight of proposals that
    are already classified well, so that frequent classes do not dominate the pseudo-labels.

    Args:
        logits: ``(N, K+1)`` class scores before softmax.
        labels: ``(N,)`` assigned classes in ``[0, K]``.
        gamma: exponent; 0 gives the mean cross-entropy.
        weight: ``(N,)`` factors on the losses of the proposals, before the mean over all N.

    Returns:
        Scalar; an exact zero that keeps the graph if there are no proposals.
    """
    loss = F.cross_entropy(at_least_float32(logits), labels, reduction="none")
    # 1 - p = -expm1(-loss) is accurate near 0. At 0 the slope would be infinite for gamma < 1.
    modulation = (-loss).expm1().neg().clamp(min=1e-12) ** gamma
    loss = modulation * loss
    if weight is not None:
        loss = loss * weight.detach()
    return loss.sum() / max(len(labels), 1)
