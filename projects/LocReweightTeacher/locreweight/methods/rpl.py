"""Class-adaptive part of RPL: thresholds and weights that depend on how certain a class is.

Li et al., "Rethinking Pseudo Labels for Semi-Supervised Object Detection" (2022). **A
reconstruction**: the authors published no code, and the constants (``SEMI.RPL``) are not known with
certainty.

``d_c`` is the sum of the scores of all pseudo-labels of class ``c`` so far. A class with few and
uncertain pseudo-labels gets a lower threshold and a larger weight in the losses:

    threshold_c = SEMI.PSEUDO_LABEL_THRESHOLD * (d_c / max d) ^ SEMI.RPL.THRESHOLD_EXPONENT
    weight_c = (max d / d_c) ^ SEMI.RPL.WEIGHT_EXPONENT

Differences from the paper:

- A pseudo-label also needs a localization quality above ``SEMI.RPL.MIN_QUALITY``. This is the
  quality of this project (Eq. 5). The paper predicts boxes by classification into buckets and uses
  the probability of the best bucket.
- ``d_c / max d`` is at least ``SEMI.RPL.MIN_RATIO``, so that a class that is never found has a
  finite weight.
"""

from __future__ import annotations

import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Instances
from torch import Tensor

from ..errors import UsageError
from ..losses.reweighting import reliability_weighted_cross_entropy
from .base import (
    METHOD_REGISTRY,
    LabelingInputs,
    SampledProposals,
    SemiSupervisedMethod,
    to_pseudo_labels,
)


@METHOD_REGISTRY.register()
class RPL(SemiSupervisedMethod):
    """The class-adaptive part of RPL, a reconstruction.

    Attributes:
        certainty: ``(K,)`` float64, ``d_c`` of each class.
    """

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        threshold_exponent: float,
        weight_exponent: float,
        min_quality: float,
        min_ratio: float,
        **kwargs: object,
    ) -> None:
        """
        Args:
            num_classes: K.
            threshold_exponent, weight_exponent, min_quality, min_ratio: ``SEMI.RPL``.
            kwargs: arguments of :class:`SemiSupervisedMethod`.
        """
        super().__init__(**kwargs)
        self.threshold_exponent = threshold_exponent
        self.weight_exponent = weight_exponent
        self.min_quality = min_quality
        self.min_ratio = min_ratio
        self.certainty = torch.zeros(num_classes, dtype=torch.float64)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        rpl = cfg.SEMI.RPL
        if not cfg.MODEL.ROI_BOX_HEAD.GAUSSIAN_BOXES and rpl.MIN_QUALITY > 0:
            raise UsageError(
                "SEMI.RPL.MIN_QUALITY needs trained variances; set "
                "MODEL.ROI_BOX_HEAD.GAUSSIAN_BOXES True, or MIN_QUALITY to 0.0"
            )
        if not 0 < rpl.MIN_RATIO <= 1:
            raise UsageError(f"SEMI.RPL.MIN_RATIO is {rpl.MIN_RATIO}; set a value in (0, 1]")
        return super().from_config(cfg) | {
            "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "threshold_exponent": rpl.THRESHOLD_EXPONENT,
            "weight_exponent": rpl.WEIGHT_EXPONENT,
            "min_quality": rpl.MIN_QUALITY,
            "min_ratio": rpl.MIN_RATIO,
        }

    @property
    def ratios(self) -> Tensor:
        """``(K,)`` certainty of each class relative to the most certain one, in (0, 1]."""
        largest = self.certainty.max()
        if largest == 0:
            return torch.ones_like(self.certainty)
        return (self.certainty / largest).clamp(min=self.min_ratio)

    @property
    def thresholds(self) -> Tensor:
        """``(K,)`` score threshold of each class."""
        return self.pseudo_label_threshold * self.ratios**self.threshold_exponent

    @property
    def weights(self) -> Tensor:
        """``(K,)`` weight of each class in the losses, at least 1."""
        return self.ratios**-self.weight_exponent

    def select_pseudo_labels(self, inputs: LabelingInputs) -> list[Instances]:
        """Select by class thresholds and quality; adds ``gt_weight``, the weight of the class."""
        selected = []
        device = inputs.output.detections[0].scores.device
        thresholds, weights = (x.float().to(device) for x in (self.thresholds, self.weights))
        for detections in inputs.output.detections:
            is_label = detections.scores > thresholds[detections.pred_classes]
            is_label &= detections.localization_quality > self.min_quality
            labels = to_pseudo_labels(detections[is_label.nonzero().squeeze(1)], 0.0)
            labels.gt_weight = weights[labels.gt_classes]
            selected.append(labels)
        return selected

    def classification_loss(self, proposals: SampledProposals) -> Tensor:
        """Weight foreground proposals by the weight of their class."""
        weight = torch.where(proposals.is_foreground, proposals.matched_gt_field("gt_weight"), 1.0)
        return reliability_weighted_cross_entropy(
            proposals.predictions.scores,
            proposals.labels,
            weight,
            per_sampled_proposal=proposals.box_predictor.normalize_by_sampled,
        )

    def box_loss(self, proposals: SampledProposals) -> Tensor:
        """Weight foreground proposals by the weight of their class."""
        return proposals.weighted_box_loss(proposals.matched_gt_field("gt_weight"))

    # The certainty of the classes

    def observe(self, inputs: LabelingInputs, pseudo_labels: list[Instances]) -> Tensor:
        """``(K,)`` sum of the scores of this process's pseudo-labels of each class."""
        total = torch.zeros_like(self.certainty)
        for labels in pseudo_labels:
            total.index_add_(0, labels.gt_classes.cpu(), labels.gt_score.double().cpu())
        return total

    def update_state(self, observations: list[Tensor]) -> None:
        self.certainty = torch.stack([self.certainty, *observations]).sum(dim=0)

    def state_dict(self) -> dict:
        return {"certainty": self.certainty}

    def load_state_dict(self, state_dict: dict) -> None:
        self.certainty = state_dict["certainty"]
