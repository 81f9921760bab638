"""The ROI head's outputs with the localization-aware branch (Fig. 4), and the losses on them.

Shapes:

    R: proposals of all images of a batch together
    K: foreground classes; class K is the background
    C: K, or 1 when box regression is class-agnostic
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, cat, cross_entropy
from detectron2.modeling.roi_heads.fast_rcnn import (
    FastRCNNOutputLayers,
    _log_classification_stats,
    fast_rcnn_inference,
)
from detectron2.structures import Instances
from torch import Tensor, nn
from torch.nn import functional as F

from ..method.localization import kl_regression_loss, localization_quality
from ..method.reweighting import (
    proposal_reliability,
    quality_weighted_box_loss,
    reliability_weighted_cross_entropy,
)
from .box_coding import CornerBoxTransform


class BoxPredictions(NamedTuple):
    """What the ROI head says of each proposal."""

    scores: Tensor  # (R, K+1) logits
    deltas: Tensor  # (R, C*4) coded box offsets
    log_variance: Tensor  # (R, C*4) of the coded offsets


class ForegroundBoxes(NamedTuple):
    """The rows of a batch that take part in box regression, F of R."""

    rows: Tensor  # (F,) indices into the R proposals
    prediction: Tensor  # (F, 4) coded offsets of the assigned class
    log_variance: Tensor  # (F, 4)
    target: Tensor  # (F, 4) coded offsets of the matched (pseudo) ground truth


class LocalizationAwareOutputLayers(FastRCNNOutputLayers):
    """Detectron2's classification and box branch, and one layer beside them for log-variances."""

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        log_variance_limit: float = 7.0,
        quality_scale: float = 1.0,
        normalize_by_sampled: bool = False,
        **kwargs: object,
    ) -> None:
        """
        Args:
            input_shape: shape of the features of one proposal.
            log_variance_limit, quality_scale: see
                :func:`locreweight.method.localization.localization_quality`.
            normalize_by_sampled: divide Eq. 10, 11 and 14 by all sampled proposals.
            kwargs: those of Detectron2's ``FastRCNNOutputLayers``.
        """
        super().__init__(input_shape, **kwargs)
        self.log_variance_limit = log_variance_limit
        self.quality_scale = quality_scale
        self.normalize_by_sampled = normalize_by_sampled
        self.log_variance = nn.Linear(self.bbox_pred.in_features, self.bbox_pred.out_features)
        # Variance 1 at first: the KL loss then starts as smooth L1.
        nn.init.normal_(self.log_variance.weight, std=1e-4)
        nn.init.zeros_(self.log_variance.bias)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        arguments = super().from_config(cfg, input_shape)
        if cfg.MODEL.ROI_BOX_HEAD.CORNER_CODING:
            weights = tuple(cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS[:2])
            arguments["box2box_transform"] = CornerBoxTransform(weights)
        return arguments | {
            "log_variance_limit": cfg.MODEL.ROI_BOX_HEAD.LOG_VARIANCE_LIMIT,
            "quality_scale": cfg.SEMI.QUALITY_SCALE,
            "normalize_by_sampled": cfg.SEMI.NORMALIZE_BY_SAMPLED,
        }

    def forward(self, x: Tensor) -> BoxPredictions:
        """``(R, ...)`` features of the proposals -> their predictions."""
        x = x.flatten(start_dim=1)
        scores, deltas = super().forward(x)
        return BoxPredictions(scores, deltas, self.log_variance(x))

    # -- labeled images ---------------------------------------------------------------------------

    def losses(self, predictions: BoxPredictions, proposals: list[Instances]) -> dict[str, Tensor]:
        """Supervised losses: Detectron2's classification loss, and Eq. 10 for the boxes.

        Args:
            predictions: of the sampled proposals of all images together.
            proposals: per image, with ``proposal_boxes``, ``gt_classes`` and ``gt_boxes`` (absent
                in an image without ground truth), xyxy, absolute pixels of the labeled view.
        """
        labels = cat([p.gt_classes for p in proposals])
        _log_classification_stats(predictions.scores, labels)
        boxes = self._foreground(predictions, proposals, labels)
        divergence = kl_regression_loss(
            boxes.prediction, boxes.target, boxes.log_variance, limit=self.log_variance_limit
        )
        losses = {
            "loss_cls": cross_entropy(predictions.scores, labels, reduction="mean"),
            "loss_box_reg": divergence.sum() / self._normalizer(boxes, labels),
        }
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}

    # -- unlabeled images -------------------------------------------------------------------------

    def unsupervised_losses(
        self,
        predictions: BoxPredictions,
        proposals: list[Instances],
        *,
        quality: Tensor | None,
        reliability: Tensor | None,
    ) -> dict[str, Tensor]:
        """The student's losses on pseudo-labels, weighted by LER (Eq. 11) and PRC (Eq. 14).

        Args:
            predictions: the student's, of the sampled proposals of all unlabeled images together.
            proposals: per image, as in :meth:`losses`, in the frame of the strong view.
            quality: ``(R,)`` localization quality of the pseudo-label that each proposal is matched
                to (LER); None weights all alike.
            reliability: ``(R,)`` the teacher's view of each proposal (PRC); None takes
                Detectron2's classification loss.
        """
        labels = cat([p.gt_classes for p in proposals])
        boxes = self._foreground(predictions, proposals, labels)
        box_loss = F.smooth_l1_loss(
            boxes.prediction, boxes.target, reduction="none", beta=self.smooth_l1_beta
        )
        weights = boxes.target.new_ones(len(labels)) if quality is None else quality
        if reliability is None:
            loss_cls = cross_entropy(predictions.scores, labels, reduction="mean")
        else:
            loss_cls = reliability_weighted_cross_entropy(
                predictions.scores,
                labels,
                reliability,
                per_sampled_proposal=self.normalize_by_sampled,
            )
        losses = {
            "loss_cls": loss_cls,
            "loss_box_reg": quality_weighted_box_loss(
                box_loss, weights[boxes.rows], self._normalizer(boxes, labels)
            ),
        }
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}

    def reliability(self, predictions: BoxPredictions, labels: Tensor) -> Tensor:
        """``(R,)`` reliability of proposals with these labels, seen by this model (Eq. 12, 13)."""
        return proposal_reliability(
            predictions.scores.float().softmax(dim=1),
            predictions.log_variance.unflatten(1, (-1, 4)),
            labels,
            limit=self.log_variance_limit,
            scale=self.quality_scale,
        )

    # -- inference --------------------------------------------------------------------------------

    def inference(
        self, predictions: BoxPredictions, proposals: list[Instances]
    ) -> tuple[list[Instances], list[Tensor]]:
        """As Detectron2's; each ``Instances`` also has ``localization_quality``, ``(N,)``.

        It is that of the ROI which NMS kept, for the predicted class (Eq. 5).
        """
        boxes = self.predict_boxes(predictions, proposals)
        probabilities = self.predict_probs(predictions, proposals)
        log_variances = predictions.log_variance.unflatten(1, (-1, 4)).split(
            [len(p) for p in proposals]
        )
        instances, kept_rows = fast_rcnn_inference(
            boxes,
            probabilities,
            [p.image_size for p in proposals],
            self.test_score_thresh,
            self.test_nms_thresh,
            self.test_topk_per_image,
        )
        for i, found in enumerate(instances):
            # Rows count only what was finite; without this one bad row would shift the others.
            finite = boxes[i].isfinite().all(dim=1) & probabilities[i].isfinite().all(dim=1)
            log_variance = log_variances[i][finite][kept_rows[i]]
            found.localization_quality = localization_quality(
                self._of_class(log_variance, found.pred_classes),
                limit=self.log_variance_limit,
                scale=self.quality_scale,
            )
        return instances, kept_rows

    # Detectron2's methods below take (scores, deltas).

    def predict_boxes(
        self, predictions: BoxPredictions, proposals: list[Instances]
    ) -> tuple[Tensor, ...]:
        return super().predict_boxes(predictions[:2], proposals)

    def predict_probs(
        self, predictions: BoxPredictions, proposals: list[Instances]
    ) -> tuple[Tensor, ...]:
        return super().predict_probs(predictions[:2], proposals)

    def predict_boxes_for_gt_classes(
        self, predictions: BoxPredictions, proposals: list[Instances]
    ) -> tuple[Tensor, ...]:
        return super().predict_boxes_for_gt_classes(predictions[:2], proposals)

    # -- parts ------------------------------------------------------------------------------------

    def _foreground(
        self, predictions: BoxPredictions, proposals: list[Instances], labels: Tensor
    ) -> ForegroundBoxes:
        rows = (labels < self.num_classes).nonzero().squeeze(1)
        # An image without (pseudo) ground truth has no gt_boxes and no foreground proposal.
        matched = cat(
            [(p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes).tensor for p in proposals]
        )
        source = cat([p.proposal_boxes.tensor for p in proposals])
        return ForegroundBoxes(
            rows,
            self._of_class(predictions.deltas[rows].unflatten(1, (-1, 4)), labels[rows]).float(),
            self._of_class(
                predictions.log_variance[rows].unflatten(1, (-1, 4)), labels[rows]
            ).float(),
            self.box2box_transform.get_deltas(source[rows], matched[rows]),
        )

    def _of_class(self, values: Tensor, classes: Tensor) -> Tensor:
        """``(F, C, 4), (F,) -> (F, 4)``: the values of each row's class."""
        if values.shape[1] == 1:
            return values[:, 0]
        return values[torch.arange(len(values), device=values.device), classes]

    def _normalizer(self, boxes: ForegroundBoxes, labels: Tensor) -> int:
        return max(len(labels) if self.normalize_by_sampled else len(boxes.rows), 1)
