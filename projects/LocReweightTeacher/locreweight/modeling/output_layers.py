"""Output layers of the ROI head with the localization-aware branch (Fig. 4), and their losses.

Shapes:

    R: number of proposals, all images of a batch together
    F: number of foreground proposals among them
    K: number of foreground classes; class ``K`` is the background
    C: K, or 1 if box regression is class-agnostic
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
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UsageError
from ..losses.focal import focal_cross_entropy
from ..losses.localization import at_least_float32, kl_regression_loss, localization_quality
from .box_coding import CornerBoxTransform
from .box_voting import Candidates, vote


class BoxPredictions(NamedTuple):
    """Predictions of the ROI head for R proposals."""

    scores: Tensor  # (R, K+1) logits
    deltas: Tensor  # (R, C*4) coded box offsets
    log_variance: Tensor  # (R, C*4) log-variances of the coded box offsets

    @property
    def probabilities(self) -> Tensor:
        """``(R, K+1)`` softmax of the scores, float32."""
        return self.scores.float().softmax(dim=1)


class ForegroundBoxes(NamedTuple):
    """The foreground proposals of a batch, for the box losses."""

    rows: Tensor  # (F,) their indices among the R proposals
    prediction: Tensor  # (F, 4) predicted coded offsets for the assigned class
    log_variance: Tensor  # (F, 4) log-variances of the prediction
    target: Tensor  # (F, 4) coded offsets of the matched ground truth or pseudo-label
    normalizer: int  # divisor of the summed loss (Eq. 10, 11), at least 1


class LocalizationAwareOutputLayers(FastRCNNOutputLayers):
    """Detectron2's ``FastRCNNOutputLayers`` with a linear layer that predicts log-variances."""

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
        voting_sigma: float = 0.0,
        **kwargs: object,
    ) -> None:
        """
        Args:
            input_shape: shape of the features of one proposal.
            log_variance_limit, quality_scale: ``limit`` and ``scale`` of
                :func:`locreweight.losses.localization.localization_quality`.
            normalize_by_sampled: divide Eq. 10, 11 and 14 by the number of all sampled proposals.
            gaussian_boxes: train boxes of labeled images with the KL loss (Eq. 10). Otherwise they
                are trained with smooth L1, and the log-variance layer is not trained.
            focal_gamma: if positive, use the focal loss with this exponent for classification.
            voting_sigma: if positive, detected boxes are averaged (:func:`.box_voting.vote`), which
                requires :class:`CornerBoxTransform`.
            kwargs: arguments of Detectron2's ``FastRCNNOutputLayers``.
        """
        super().__init__(input_shape, **kwargs)
        self.log_variance_limit = log_variance_limit
        self.quality_scale = quality_scale
        self.normalize_by_sampled = normalize_by_sampled
        self.gaussian_boxes = gaussian_boxes
        self.focal_gamma = focal_gamma
        self.voting_sigma = voting_sigma
        self.log_variance = nn.Linear(self.bbox_pred.in_features, self.bbox_pred.out_features)
        # The variance is about 1 at first, so the KL loss starts as smooth L1.
        nn.init.normal_(self.log_variance.weight, std=1e-4)
        nn.init.zeros_(self.log_variance.bias)
        # DistributedDataParallel waits for the gradient of every parameter that requires one.
        self.log_variance.requires_grad_(gaussian_boxes)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        arguments = super().from_config(cfg, input_shape)
        if cfg.MODEL.ROI_BOX_HEAD.CORNER_CODING:
            weights = tuple(cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS[:2])
            arguments["box2box_transform"] = CornerBoxTransform(weights)
        elif cfg.MODEL.ROI_BOX_HEAD.VOTING_SIGMA > 0:
            raise UsageError(
                "MODEL.ROI_BOX_HEAD.VOTING_SIGMA needs variances of corners: set it to 0, or train "
                "with MODEL.ROI_BOX_HEAD.CORNER_CODING True"
            )
        return arguments | {
            "log_variance_limit": cfg.MODEL.ROI_BOX_HEAD.LOG_VARIANCE_LIMIT,
            "quality_scale": cfg.SEMI.QUALITY_SCALE,
            "normalize_by_sampled": cfg.SEMI.NORMALIZE_BY_SAMPLED,
            "gaussian_boxes": cfg.MODEL.ROI_BOX_HEAD.GAUSSIAN_BOXES,
            "focal_gamma": cfg.MODEL.ROI_BOX_HEAD.FOCAL_GAMMA,
            "voting_sigma": cfg.MODEL.ROI_BOX_HEAD.VOTING_SIGMA,
        }

    def forward(self, x: Tensor) -> BoxPredictions:
        """Predict from ``(R, ...)`` features of the proposals."""
        x = x.flatten(start_dim=1)
        scores, deltas = super().forward(x)
        return BoxPredictions(scores, deltas, self.log_variance(x))

    def losses(self, predictions: BoxPredictions, proposals: list[Instances]) -> dict[str, Tensor]:
        """Compute the supervised losses: classification, and boxes by Eq. 10.

        Args:
            predictions: predictions for the sampled proposals of all images.
            proposals: one ``Instances`` per image with ``proposal_boxes``, ``gt_classes`` and, if
                the image has ground truth, ``gt_boxes``; xyxy, absolute pixels, labeled view.

        Returns:
            ``loss_cls`` and ``loss_box_reg``.
        """
        labels = cat([p.gt_classes for p in proposals])
        _log_classification_stats(predictions.scores, labels)
        foreground = self.select_foreground(predictions, proposals, labels)
        if self.gaussian_boxes:
            box_loss = kl_regression_loss(
                foreground.prediction,
                foreground.target,
                foreground.log_variance,
                limit=self.log_variance_limit,
            )
        else:
            box_loss = self.smooth_l1_box_loss(foreground)
        losses = {
            "loss_cls": self.classification_loss(predictions.scores, labels),
            "loss_box_reg": box_loss.sum() / foreground.normalizer,
        }
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}

    def classification_loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Compute the mean cross-entropy, or the focal loss if ``focal_gamma`` is positive.

        Args:
            scores: ``(R, K+1)`` logits.
            labels: ``(R,)`` in ``[0, K]``.
        """
        if self.focal_gamma > 0:
            return focal_cross_entropy(scores, labels, gamma=self.focal_gamma)
        return cross_entropy(scores, labels, reduction="mean")

    def select_foreground(
        self, predictions: BoxPredictions, proposals: list[Instances], labels: Tensor
    ) -> ForegroundBoxes:
        """Select the foreground proposals with their predictions and targets.

        Args:
            predictions: predictions for the sampled proposals of all images.
            proposals: one ``Instances`` per image, as in :meth:`losses`, in any view.
            labels: ``(R,)`` assigned classes in ``[0, K]``.
        """
        rows = (labels < self.num_classes).nonzero().squeeze(1)
        # An image without ground truth has no gt_boxes, and none of its proposals is foreground.
        matched = cat(
            [(p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes).tensor for p in proposals]
        )
        source = cat([p.proposal_boxes.tensor for p in proposals])
        prediction, log_variance = (
            _select_class(values[rows].unflatten(1, (-1, 4)), labels[rows]).float()
            for values in (predictions.deltas, predictions.log_variance)
        )
        return ForegroundBoxes(
            rows,
            prediction,
            log_variance,
            target=self.box2box_transform.get_deltas(source[rows], matched[rows]),
            normalizer=max(len(labels) if self.normalize_by_sampled else len(rows), 1),
        )

    def smooth_l1_box_loss(self, foreground: ForegroundBoxes) -> Tensor:
        """Compute the unreduced ``(F, 4)`` smooth L1 loss, in the units of the box coding."""
        return F.smooth_l1_loss(
            foreground.prediction, foreground.target, reduction="none", beta=self.smooth_l1_beta
        )

    def inference(
        self,
        predictions: BoxPredictions,
        proposals: list[Instances],
        *,
        voting: bool = True,
        max_score_threshold: float = 1.0,
    ) -> tuple[list[Instances], list[Tensor]]:
        """Run Detectron2's inference and add two fields to the detections.

        The fields are ``log_variance``, ``(N, 4)``, clamped, in the units of the box coding, and
        ``localization_quality``, ``(N,)``, its quality score (Eq. 5). Both are predictions for the
        proposal that NMS kept and for the predicted class.

        Args:
            predictions: for the proposals of all images.
            proposals: one ``Instances`` per image with ``proposal_boxes``.
            voting: average the boxes if ``voting_sigma`` is positive.
            max_score_threshold: upper limit of the threshold on scores,
                ``MODEL.ROI_HEADS.SCORE_THRESH_TEST``.

        Returns:
            the detections, and the rows of the proposals that NMS kept.
        """
        boxes = self.predict_boxes(predictions, proposals)
        probabilities = self.predict_probs(predictions, proposals)
        # For exported graphs: len() would be a constant, and ONNX cannot unflatten zero detections.
        log_variances = predictions.log_variance.unflatten(1, (-1, 4)).split(
            [p.shape[0] for p in probabilities]
        )
        instances, kept_rows = fast_rcnn_inference(
            boxes,
            probabilities,
            [p.image_size for p in proposals],
            min(self.test_score_thresh, max_score_threshold),
            self.test_nms_thresh,
            self.test_topk_per_image,
        )
        for i, detections in enumerate(instances):
            # fast_rcnn_inference drops non-finite rows first, so kept_rows does not count them.
            finite = boxes[i].isfinite().all(dim=1) & probabilities[i].isfinite().all(dim=1)
            kept = log_variances[i][finite][kept_rows[i]]
            log_variance = at_least_float32(_select_class(kept, detections.pred_classes))
            limit = self.log_variance_limit
            detections.log_variance = log_variance.clamp(-limit, limit)
            detections.localization_quality = localization_quality(
                log_variance, limit=limit, scale=self.quality_scale
            )
            if voting and self.voting_sigma > 0:
                candidates = self._candidates(
                    boxes[i][finite],
                    log_variances[i][finite],
                    probabilities[i][finite],
                    proposals[i][finite],
                )
                detections.pred_boxes = vote(
                    detections.pred_boxes, detections.pred_classes, candidates, self.voting_sigma
                )
        return instances, kept_rows

    def _candidates(
        self, boxes: Tensor, log_variance: Tensor, probabilities: Tensor, proposals: Instances
    ) -> Candidates:
        """Return what the detected boxes of an image are averaged from.

        Args:
            boxes: ``(R, C*4)`` predicted boxes, xyxy, absolute pixels; they are clipped to the
                image, as detections are.
            log_variance: ``(R, C, 4)``.
            probabilities: ``(R, K+1)``.
            proposals: R proposals with ``proposal_boxes``, xyxy, absolute pixels.
        """
        clipped = Boxes(boxes.reshape(-1, 4))
        clipped.clip(proposals.image_size)
        limit = self.log_variance_limit
        variance = self.box2box_transform.variance_in_pixels(
            at_least_float32(log_variance).clamp(-limit, limit), proposals.proposal_boxes.tensor
        )
        return Candidates(clipped.tensor.reshape(variance.shape), variance, probabilities[:, :-1])

    # Detectron2's implementations of these methods expect (scores, deltas).

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


def _select_class(values: Tensor, classes: Tensor) -> Tensor:
    """Select the four values of each row's class: ``(N, C, 4), (N,) -> (N, 4)``."""
    if values.shape[1] == 1:
        return values[:, 0]
    return values[torch.arange(values.shape[0], device=values.device), classes]
