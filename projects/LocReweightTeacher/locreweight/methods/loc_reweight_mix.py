"""LER for each coordinate, soft class labels, class weights and mixed images (not in the paper).

Besides augmentation and normalization, the method differs from the paper's in four ways:

- **LER for each coordinate**: the box loss of a coordinate is weighted by the teacher's certainty
  of it, ``1 / (1 + variance)``, in (0, 1). Eq. 5 is one weight for the whole box, below 0.5.
- **Soft labels instead of PRC**: detections with scores above ``min_score`` are pseudo-labels. The
  target of a matched proposal is the class with the sharpened score as its probability, and
  background otherwise. An object that the teacher is not sure of is therefore learned as background
  only in part. Only detections above ``SEMI.PSEUDO_LABEL_THRESHOLD`` train the boxes, and only they
  are objects for the RPN.
- **Class weights** as in RPL (:mod:`.rpl`): the losses of a proposal on a pseudo-label of class
  ``c`` are multiplied by ``(max d / d_c) ^ class_weight_exponent``, where ``d_c`` is the sum of the
  scores of the pseudo-labels of the class in all images that have entered the cache. AP is a mean
  over classes, and pseudo-labels of rare classes would have little effect otherwise.
- **Mixed images** as in :mod:`.mixpl`.

PRC needs the teacher's prediction for each proposal of the student, and a proposal in a mixed image
is in no single image of the teacher. Soft labels need only the detections.

A limitation: NMS is per class, so a detection with a low score may lie on an object that has a
confident pseudo-label of another class. Proposals that overlap the former more get its soft label.
"""

from __future__ import annotations

import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Instances
from torch import Tensor

from ..losses.soft_labels import sharpen, soft_cross_entropy
from .base import METHOD_REGISTRY, LabelingInputs, SampledProposals, StudentImage
from .certainty import check_predicts_certainty, matched_certainty, to_labels_with_certainty
from .mixpl import MixPL
from .rpl import class_ratios


@METHOD_REGISTRY.register()
class LocReweightMix(MixPL):
    """LER for each coordinate, soft class labels, class weights and mixed images.

    The metric ``pseudo_labels/per_image`` also counts the pseudo-labels below the threshold.

    Attributes:
        min_score: detections with a higher score are pseudo-labels; the threshold if it is lower.
        temperature: of the soft labels, see :func:`~locreweight.losses.soft_labels.sharpen`.
        class_weight_exponent: 0 for no class weights.
        min_class_ratio: lower bound of ``d_c / max d``, so that class weights are at most 4.
        class_certainty: ``(K,)`` float64, ``d_c`` of each class.
    """

    min_score: float = 0.2
    temperature: float = 0.5
    class_weight_exponent: float = 0.6
    min_class_ratio: float = 0.1
    further_fields = ("gt_score", "gt_certainty")

    @configurable
    def __init__(self, *, num_classes: int, **kwargs: object) -> None:
        """
        Args:
            num_classes: K.
            kwargs: arguments of :class:`MixPL`.
        """
        super().__init__(**kwargs)
        self.class_certainty = torch.zeros(num_classes, dtype=torch.float64)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        check_predicts_certainty(cfg)
        return super().from_config(cfg) | {"num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES}

    def select_pseudo_labels(self, inputs: LabelingInputs) -> list[Instances]:
        """Select all detections with a score above ``min_score``, and add ``gt_certainty``."""
        score = min(self.min_score, self.pseudo_label_threshold)
        return to_labels_with_certainty(inputs, score)

    def rpn_labels(self, pseudo_labels: Instances) -> Instances:
        """Return the pseudo-labels above the threshold."""
        return pseudo_labels[(pseudo_labels.gt_score > self.pseudo_label_threshold).nonzero()[:, 0]]

    def _fit(self, i: int, size: tuple[int, int], device: torch.device) -> StudentImage:
        image = super()._fit(i, size, device)
        labels = image.pseudo_labels
        # In the flipped image, the left side of a box is the right side of the cached one.
        x1, y1, x2, y2 = labels.gt_certainty.unbind(dim=1)
        labels.gt_certainty = torch.stack([x2, y1, x1, y2], dim=1)
        return image

    def classification_loss(self, proposals: SampledProposals) -> Tensor:
        """Return the mean over all sampled proposals of the cross-entropy to soft labels.

        Each proposal is weighted by :meth:`_weight`.
        """
        probability = sharpen(proposals.matched_gt_field("gt_score"), self.temperature)
        is_foreground = proposals.is_foreground
        proposals.log_mean("proposals/label_probability", probability, is_foreground)
        loss = soft_cross_entropy(proposals.predictions.scores, proposals.labels, probability)
        return (self._weight(proposals) * loss).sum() / max(len(loss), 1)

    def box_loss(self, proposals: SampledProposals) -> Tensor:
        """Return the smooth L1 loss, each coordinate weighted by the teacher's certainty of it.

        Proposals that match a pseudo-label below the threshold have no loss, but count in the
        normalizer. Each proposal is also weighted by :meth:`_weight`.
        """
        foreground = proposals.foreground
        certainty = matched_certainty(proposals)
        is_confident = proposals.matched_gt_field("gt_score") > self.pseudo_label_threshold
        proposals.log_mean("proposals/above_threshold", is_confident, proposals.is_foreground)
        has_loss = proposals.is_foreground & is_confident
        proposals.log_mean("proposals/certainty", certainty.mean(dim=1), has_loss)
        weight = (self._weight(proposals) * is_confident)[:, None] * certainty
        return (
            weight[foreground.rows] * proposals.smooth_l1_box_loss()
        ).sum() / foreground.normalizer

    def _weight(self, proposals: SampledProposals) -> Tensor:
        """``(R,)`` weight of the image times the class weight, which is 1 for background."""
        ratios = class_ratios(self.class_certainty, self.min_class_ratio)
        weights = torch.cat([ratios**-self.class_weight_exponent, ratios.new_ones(1)]).float()
        class_weight = weights.to(proposals.labels.device)[proposals.labels]
        proposals.log_mean("proposals/class_weight", class_weight, proposals.is_foreground)
        return proposals.image_weight * class_weight

    # The cache of MixPL and the certainty of the classes

    def update_state(self, observations: list[list[dict]]) -> None:
        super().update_state(observations)
        entries = [entry for observed in observations for entry in observed]
        classes = torch.cat([entry["classes"] for entry in entries])
        scores = torch.cat([entry["gt_score"] for entry in entries]).double()
        self.class_certainty = self.class_certainty.index_add(0, classes, scores)

    def state_dict(self) -> dict:
        return super().state_dict() | {"class_certainty": self.class_certainty}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self.class_certainty = state_dict["class_certainty"]
