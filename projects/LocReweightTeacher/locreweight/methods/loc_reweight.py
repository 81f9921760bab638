"""The paper's method: reweight the unsupervised losses by localization quality (Sec. 3.3, 3.4)."""

from __future__ import annotations

from detectron2.config import CfgNode, configurable
from torch import Tensor

from ..errors import UsageError
from ..losses.reweighting import proposal_reliability, reliability_weighted_cross_entropy
from .base import METHOD_REGISTRY, SampledProposals, SemiSupervisedMethod


@METHOD_REGISTRY.register()
class LocReweight(SemiSupervisedMethod):
    """LER and PRC. With both turned off, this is the paper's baseline (Table 3, row 1)."""

    has_ler_and_prc = True

    @configurable
    def __init__(self, *, ler: bool, prc: bool, **kwargs: object) -> None:
        """
        Args:
            ler: weight the box loss (Eq. 11); otherwise it is unweighted.
            prc: weight the classification loss (Eq. 14); otherwise it is unweighted.
            kwargs: arguments of :class:`SemiSupervisedMethod`.
        """
        super().__init__(**kwargs)
        self.ler = ler
        self.prc = prc

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        reweights = cfg.SEMI.LER or cfg.SEMI.PRC
        is_supervised = cfg.SEMI.BURN_IN_ITERS >= cfg.SOLVER.MAX_ITER
        if reweights and not (cfg.MODEL.ROI_BOX_HEAD.GAUSSIAN_BOXES or is_supervised):
            raise UsageError(
                "SEMI.LER and SEMI.PRC use predicted variances, which are not trained: set "
                "MODEL.ROI_BOX_HEAD.GAUSSIAN_BOXES True, or SEMI.LER False and SEMI.PRC False"
            )
        return super().from_config(cfg) | {"ler": cfg.SEMI.LER, "prc": cfg.SEMI.PRC}

    def box_loss(self, proposals: SampledProposals) -> Tensor | None:
        """LER: weight foreground proposals by the quality of their pseudo-label (Eq. 11)."""
        if not self.ler:
            return super().box_loss(proposals)
        return proposals.weighted_box_loss(self.localization_quality(proposals))

    def localization_quality(self, proposals: SampledProposals) -> Tensor:
        """``(R,)`` localization quality score of the matched pseudo-label (Eq. 5)."""
        return proposals.matched_gt_field("gt_localization_quality")

    def classification_loss(self, proposals: SampledProposals) -> Tensor:
        """PRC: weight proposals by the reliability that the teacher gives them (Eq. 14)."""
        if not self.prc:
            return super().classification_loss(proposals)
        reliability = self.reliability(proposals)
        is_foreground = proposals.is_foreground
        proposals.log_mean("proposals/reliability_foreground", reliability, is_foreground)
        proposals.log_mean("proposals/reliability_background", reliability, ~is_foreground)
        return reliability_weighted_cross_entropy(
            proposals.predictions.scores,
            proposals.labels,
            reliability,
            per_sampled_proposal=proposals.box_predictor.normalize_by_sampled,
        )

    def reliability(self, proposals: SampledProposals) -> Tensor:
        """``(R,)`` reliability of the proposals (foreground: Eq. 12, background: Eq. 13)."""
        teacher, box_predictor = proposals.teacher_predictions, proposals.box_predictor
        return proposal_reliability(
            teacher.probabilities,
            teacher.log_variance.unflatten(1, (-1, 4)),
            proposals.labels,
            limit=box_predictor.log_variance_limit,
            scale=box_predictor.quality_scale,
        )
