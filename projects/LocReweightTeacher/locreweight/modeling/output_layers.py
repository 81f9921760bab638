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

from ..losses.focal import focal_cross_entropy
from ..losses.localization import at_least_float32, kl_regression_loss, localization_quality
from ..losses.reweighting import proposal_reliability
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
        gaussian_boxes: bool = True,
        focal_gamma: float = 0.0,
        **kwargs: object,
    ) -> None:
        """
        Args:
            input_shape: shape of the features of one proposal.
            log_variance_limit, quality_scale: see
                :func:`locreweight.losses.localization.localization_quality`.
            normalize_by_sampled: divide Eq. 10, 11 and 14 by all sampled proposals.
            gaussian_boxes: fit the variances by Eq. 10; otherwise boxes are trained with smooth L1,
                and the branch for the variances stays as it was made.
            focal_gamma: above 0, classify with the focal loss of this exponent.
            kwargs: those of Detectron2's ``FastRCNNOutputLayers``.
        """
        super().__init__(input_shape, **kwargs)
        self.log_variance_limit = log_variance_limit
        self.quality_scale = quality_scale
        self.normalize_by_sampled = normalize_by_sampled
        self.gaussian_boxes = gaussian_boxes
        self.focal_gamma = focal_gamma
        self.log_variance = nn.Linear(self.bbox_pred.in_features, self.bbox_pred.out_features)
        # Variance 1 at first: the KL loss then starts as smooth L1.
        nn.init.normal_(self.log_variance.weight, std=1e-4)
        nn.init.zeros_(self.log_variance.bias)
        # Several processes wait for the gradient of every parameter that asks for one.
        self.log_variance.requires_grad_(gaussian_boxes)

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
            "gaussian_boxes": cfg.MODEL.ROI_BOX_HEAD.GAUSSIAN_BOXES,
            "focal_gamma": cfg.MODEL.ROI_BOX_HEAD.FOCAL_GAMMA,
        }

    def forward(self, x: Tensor) -> BoxPredictions:
        """``(R, ...)`` features of the proposals -> their predictions."""
        x = x.flatten(start_dim=1)
        scores, deltas = super().forward(x)
        return BoxPredictions(scores, deltas, self.log_variance(x))

    # -- labeled images ---------------------------------------------------------------------------

    def losses(self, predictions: BoxPredictions, proposals: list[Instances]) -> dict[str, Tensor]:
        """Supervised losses: the detector's classification loss, and Eq. 10 for the boxes.

        Args:
            predictions: of the sampled proposals of all images together.
            proposals: per image, with ``proposal_boxes``, ``gt_classes`` and ``gt_boxes`` (absent
                in an image without ground truth), xyxy, absolute pixels of the labeled view.
        """
        labels = cat([p.gt_classes for p in proposals])
        _log_classification_stats(predictions.scores, labels)
        boxes = self.foreground(predictions, proposals, labels)
        if self.gaussian_boxes:
            box_loss = kl_regression_loss(
                boxes.prediction, boxes.target, boxes.log_variance, limit=self.log_variance_limit
            )
        else:
            box_loss = self.box_losses(boxes)
        losses = {
            "loss_cls": self.classification_loss(predictions.scores, labels),
            "loss_box_reg": box_loss.sum() / self.normalizer(boxes, labels),
        }
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}

    # -- parts of losses, on labeled and unlabeled images -----------------------------------------

    def classification_loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """The detector's own classification loss: mean cross-entropy, or focal loss.

        Args:
            scores: ``(R, K+1)`` logits.
            labels: ``(R,)`` in ``[0, K]``.
        """
        if self.focal_gamma > 0:
            return focal_cross_entropy(scores, labels, gamma=self.focal_gamma)
        return cross_entropy(scores, labels, reduction="mean")

    def foreground(
        self, predictions: BoxPredictions, proposals: list[Instances], labels: Tensor
    ) -> ForegroundBoxes:
        """The foreground proposals: what is predicted for their class, and what it should be.

        Args:
            predictions: of the sampled proposals of all images together.
            proposals: per image, as in :meth:`losses`; any view.
            labels: ``(R,)`` their classes in ``[0, K]``.
        """
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

    def box_losses(self, boxes: ForegroundBoxes) -> Tensor:
        """``(F, 4)`` smooth L1, in the scaled units of the box coding."""
        return F.smooth_l1_loss(
            boxes.prediction, boxes.target, reduction="none", beta=self.smooth_l1_beta
        )

    def normalizer(self, boxes: ForegroundBoxes, labels: Tensor) -> int:
        """What a sum of box losses is divided by (Eq. 10, 11): foreground or sampled proposals."""
        return max(len(labels) if self.normalize_by_sampled else len(boxes.rows), 1)

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
        """As Detectron2's; each ``Instances`` has two fields more.

        ``log_variance``, ``(N, 4)``, bounded, in the units of the box coding, and
        ``localization_quality``, ``(N,)``, which Eq. 5 makes of it. They are those of the ROI which
        NMS kept, for the predicted class.
        """
        boxes = self.predict_boxes(predictions, proposals)
        probabilities = self.predict_probs(predictions, proposals)
        # Of shapes, not by len(), which would be a constant in an exported graph.
        log_variances = predictions.log_variance.unflatten(1, (-1, 4)).split(
            [p.shape[0] for p in probabilities]
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
            of_kept = log_variances[i][finite][kept_rows[i]]
            log_variance = at_least_float32(self._of_class(of_kept, found.pred_classes))
            limit = self.log_variance_limit
            found.log_variance = log_variance.clamp(-limit, limit)
            found.localization_quality = localization_quality(
                log_variance, limit=limit, scale=self.quality_scale
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

    def _of_class(self, values: Tensor, classes: Tensor) -> Tensor:
        """``(F, C, 4), (F,) -> (F, 4)``: the values of each row's class."""
        if values.shape[1] == 1:
            return values[:, 0]
        return values[torch.arange(values.shape[0], device=values.device), classes]
