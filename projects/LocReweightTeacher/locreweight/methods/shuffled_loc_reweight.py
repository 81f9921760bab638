"""A control for LER and PRC: the same weights, randomly assigned to the proposals.

The weights of Eq. 11 to 14 are well below 1, so they also make the unsupervised losses smaller. The
difference between :class:`LocReweight` and this control shows how much of its gain comes from
weighting the right proposals.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import METHOD_REGISTRY, SampledProposals
from .loc_reweight import LocReweight


@METHOD_REGISTRY.register()
class ShuffledLocReweight(LocReweight):
    """LER and PRC with shuffled weights."""

    def localization_quality(self, proposals: SampledProposals) -> Tensor:
        return shuffle_within_groups(
            super().localization_quality(proposals), proposals.is_foreground
        )

    def reliability(self, proposals: SampledProposals) -> Tensor:
        return shuffle_within_groups(super().reliability(proposals), proposals.is_foreground)


def shuffle_within_groups(weights: Tensor, is_foreground: Tensor) -> Tensor:
    """Shuffle the weights of the foreground and of the background proposals, each group by itself.

    Args:
        weights: ``(R,)``.
        is_foreground: ``(R,)`` bool.

    Returns:
        ``(R,)``.
    """
    # Two random orders, both with all of the background first. The host does not wait for either.
    source, target = (
        (torch.rand_like(weights, dtype=torch.float32) + is_foreground).argsort() for _ in range(2)
    )
    return torch.empty_like(weights).index_copy(0, target, weights[source])
