"""Focal loss over classes and background, with which Unbiased Teacher classifies (not the paper).

Shapes:

    N: number of proposals
    K: number of foreground classes; class ``K`` is the background
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .localization import at_least_float32


def focal_cross_entropy(logits: Tensor, labels: Tensor, *, gamma: float) -> Tensor:
    """``mean((1 - p)^gamma * -log p)`` of the assigned class's softmax probability ``p``.

    The focal loss of Lin et al. (2017) in its softmax form, as in Liu et al., "Unbiased Teacher for
    Semi-Supervised Object Detection" (2021), Sec. 3.4: proposals that are already classified well
    count less, so that the frequent classes of biased pseudo-labels do not drown the others.

    Args:
        logits: ``(N, K+1)`` class scores before softmax.
        labels: ``(N,)`` assigned classes in ``[0, K]``.
        gamma: 0 is the mean cross-entropy.

    Returns:
        Scalar; an exact zero that keeps the graph if there is no proposal.
    """
    loss = F.cross_entropy(at_least_float32(logits), labels, reduction="none")
    # 1 - p = -expm1(-loss) keeps its digits; at 0 it would have an infinite slope for gamma < 1.
    modulation = (-loss).expm1().neg().clamp(min=1e-12) ** gamma
    return (modulation * loss).sum() / max(len(labels), 1)
