"""CST: two students, each of which learns from the teacher of the other.

Liu et al., "Cycle Self-Training for Semi-Supervised Object Detection with Distribution Consistency
Reweighting" (2022). **A reconstruction**: only the abstract was available. It states the cycle and
that pseudo-labels are weighted by the consistency of the two teachers' class distributions. The
rest is assumed:

- The weight of a pseudo-label is ``exp(-E * KL(p || q))``, where ``p`` and ``q`` are the class
  probabilities at its box from the teacher that made it and from the other teacher, both in the
  weak view, and ``E`` is ``SEMI.CST.AGREEMENT_EXPONENT``.
- The weight applies to the classification loss of the proposals that are matched to the
  pseudo-label. Everything else is as in Unbiased Teacher, without a box loss on pseudo-labels.
- The students differ in the layers that ``MODEL.WEIGHTS`` does not have, in their strong views and
  in the proposals that are sampled. They have the same labeled images.
- The result is the first teacher.

A step takes about twice the time and the memory of Unbiased Teacher.
"""

from __future__ import annotations

import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Instances
from torch import Tensor

from ..losses.focal import focal_cross_entropy
from .base import METHOD_REGISTRY, LabelingInputs, SampledProposals, SemiSupervisedMethod


@METHOD_REGISTRY.register()
class CST(SemiSupervisedMethod):
    """Cycle self-training, a reconstruction."""

    num_members = 2
    own_strong_views = True

    @configurable
    def __init__(self, *, agreement_exponent: float, **kwargs: object) -> None:
        """
        Args:
            agreement_exponent: factor on the divergence of the teachers; 0 turns the weights off.
            kwargs: arguments of :class:`SemiSupervisedMethod`.
        """
        super().__init__(**kwargs)
        self.agreement_exponent = agreement_exponent

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        return super().from_config(cfg) | {"agreement_exponent": cfg.SEMI.CST.AGREEMENT_EXPONENT}

    def select_for_members(self, inputs: list[LabelingInputs]) -> list[list[Instances]]:
        """Select each student's pseudo-labels from the other teacher; adds ``gt_weight``."""
        first, second = inputs
        return [self._weighted_labels(second, first), self._weighted_labels(first, second)]

    def _weighted_labels(self, labeling: LabelingInputs, other: LabelingInputs) -> list[Instances]:
        """Select the pseudo-labels of one teacher, and weight them by the agreement of another."""
        selected = self.select_pseudo_labels(labeling)
        boxes = [labels.gt_boxes.tensor for labels in selected]
        divergence = kl_divergence(
            *(x.teacher.predict_rois(x.output, boxes).probabilities for x in (labeling, other))
        )
        weights = torch.exp(-self.agreement_exponent * divergence)
        for labels, weight in zip(selected, weights.split([len(x) for x in boxes]), strict=True):
            labels.gt_weight = weight
        return selected

    def classification_loss(self, proposals: SampledProposals) -> Tensor:
        """Weight foreground proposals by the weight of their pseudo-label."""
        weight = torch.where(proposals.is_foreground, proposals.matched_gt_field("gt_weight"), 1.0)
        proposals.log_mean("proposals/teacher_agreement", weight, proposals.is_foreground)
        return focal_cross_entropy(
            proposals.predictions.scores,
            proposals.labels,
            gamma=proposals.box_predictor.focal_gamma,
            weight=weight,
        )

    def box_loss(self, proposals: SampledProposals) -> None:
        return None


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """Compute the Kullback-Leibler divergence of rows of probabilities.

    Args:
        p, q: ``(N, K+1)`` probabilities.

    Returns:
        ``(N,)`` ``sum(p * log(p / q))``, at least 0. Probabilities that underflowed to 0 count as
        the smallest normal number.
    """
    tiny = torch.finfo(p.dtype).tiny
    logarithms = p.clamp(min=tiny).log() - q.clamp(min=tiny).log()
    return (p * logarithms).sum(dim=1).clamp(min=0)
