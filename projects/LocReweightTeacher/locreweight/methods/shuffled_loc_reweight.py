"""A control for LER and PRC: their very weights, dealt out by chance.

The weights of Eq. 11 to 14 lie well below 1, so that they also make the unsupervised losses
smaller. Whether they choose the right proposals shows in what the method gains over this one, whose
weights are as small and know nothing of the proposals.
"""

from __future__ import annotations

from functools import partial

import torch
from detectron2.config import CfgNode
from torch import Tensor

from .base import (
    METHOD_REGISTRY,
    AboveThreshold,
    SemiSupervisedMethod,
    unweighted_box_loss,
    unweighted_classification_loss,
)
from .loc_reweight import ler, prc


@METHOD_REGISTRY.register()
def ShuffledLocReweight(cfg: CfgNode) -> SemiSupervisedMethod:
    """``LocReweight`` with shuffled weights; ``SEMI.LER`` and ``SEMI.PRC`` turn its parts on."""
    return SemiSupervisedMethod(
        choose_pseudo_labels=AboveThreshold(cfg.SEMI.PSEUDO_LABEL_THRESHOLD),
        classify=partial(prc, rearrange=shuffled)
        if cfg.SEMI.PRC
        else unweighted_classification_loss,
        regress_boxes=partial(ler, rearrange=shuffled) if cfg.SEMI.LER else unweighted_box_loss,
    )


def shuffled(weights: Tensor, is_foreground: Tensor) -> Tensor:
    """The weights of foreground and of background proposals, each shuffled among themselves.

    Args:
        weights: ``(R,)``.
        is_foreground: ``(R,)`` bool.

    Returns:
        ``(R,)``.
    """
    # Any two orders that begin with all of the background; made without waiting for the device.
    taken, given = (
        (torch.rand_like(weights, dtype=torch.float32) + is_foreground).argsort() for _ in range(2)
    )
    return torch.empty_like(weights).index_copy(0, given, weights[taken])
