"""The paper's method: LER and PRC, each with its switch (Table 3; both off is its row 1)."""

from __future__ import annotations

from collections.abc import Callable

from detectron2.config import CfgNode
from torch import Tensor

from ..losses.reweighting import quality_weighted_box_loss, reliability_weighted_cross_entropy
from .base import (
    METHOD_REGISTRY,
    AboveThreshold,
    SampledProposals,
    SemiSupervisedMethod,
    unweighted_box_loss,
    unweighted_classification_loss,
)


@METHOD_REGISTRY.register()
def LocReweight(cfg: CfgNode) -> SemiSupervisedMethod:
    """``SEMI.LER`` and ``SEMI.PRC`` turn its two parts on."""
    return SemiSupervisedMethod(
        choose_pseudo_labels=AboveThreshold(cfg.SEMI.PSEUDO_LABEL_THRESHOLD),
        classify=prc if cfg.SEMI.PRC else unweighted_classification_loss,
        regress_boxes=ler if cfg.SEMI.LER else unweighted_box_loss,
    )


# ``(weights, is_foreground) -> weights``, all ``(R,)``: what a variant of the method does to them.
Rearrange = Callable[[Tensor, Tensor], Tensor]


def as_they_are(weights: Tensor, is_foreground: Tensor) -> Tensor:
    """The paper's method."""
    return weights


def prc(sampled: SampledProposals, rearrange: Rearrange = as_they_are) -> Tensor:
    """Proposals weighted by how reliable the teacher finds them (Eq. 12, 13, 14)."""
    predictor = sampled.predictor
    reliability = predictor.reliability(sampled.teacher_predictions, sampled.labels)
    reliability = rearrange(reliability, sampled.is_foreground)
    sampled.measure("proposals/reliability_foreground", reliability, sampled.is_foreground)
    sampled.measure("proposals/reliability_background", reliability, ~sampled.is_foreground)
    return reliability_weighted_cross_entropy(
        sampled.predictions.scores,
        sampled.labels,
        reliability,
        per_sampled_proposal=predictor.normalize_by_sampled,
    )


def ler(sampled: SampledProposals, rearrange: Rearrange = as_they_are) -> Tensor:
    """Foreground proposals weighted by the localization quality of their pseudo-label (Eq. 11)."""
    predictor = sampled.predictor
    boxes = predictor.foreground(sampled.predictions, sampled.proposals, sampled.labels)
    quality = sampled.matched_gt_field("gt_localization_quality")
    quality = rearrange(quality, sampled.is_foreground)[boxes.rows]
    normalizer = predictor.normalizer(boxes, sampled.labels)
    return quality_weighted_box_loss(predictor.box_losses(boxes), quality, normalizer)
