"""A control for LER and PRC: every proposal has the mean of their weights.

The losses stay as small as with LER and PRC, but no proposal is preferred to another one. The
difference between :class:`LocReweight` and this control shows how much of its gain comes from
preferring some proposals.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import METHOD_REGISTRY, SampledProposals
from .loc_reweight import LocReweight


@METHOD_REGISTRY.register()
class MeanLocReweight(LocReweight):
    """LER and PRC with the mean weights of the batch, separately for foreground and background."""

    def localization_quality(self, proposals: SampledProposals) -> Tensor:
        return mean_within_groups(super().localization_quality(proposals), proposals.is_foreground)

    def reliability(self, proposals: SampledProposals) -> Tensor:
        return mean_within_groups(super().reliability(proposals), proposals.is_foreground)


def mean_within_groups(weights: Tensor, is_foreground: Tensor) -> Tensor:
    """Replace the weights of the foreground and of the background proposals by their means.

    Args:
        weights: ``(R,)``.
        is_foreground: ``(R,)`` bool.

    Returns:
        ``(R,)``.
    """
    # Indexing with the masks would make the host wait for the device.
    foreground, background = (
        (weights * mask).sum() / mask.sum().clamp(min=1) for mask in (is_foreground, ~is_foreground)
    )
    return torch.where(is_foreground, foreground, background)
