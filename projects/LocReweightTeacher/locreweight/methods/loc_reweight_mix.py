"""LER for each coordinate, soft class labels and mixed images (not in the paper).

The loss on unlabeled images differs from the paper's in three ways:

- **LER for each coordinate**: the box loss of a coordinate is weighted by the teacher's certainty
  of it, ``1 / (1 + variance)``, in (0, 1). Eq. 5 is one weight for the whole box, below 0.5.
- **Soft labels instead of PRC**: detections with scores above ``min_score`` are pseudo-labels. The
  target of a matched proposal is the class with the sharpened score as its probability, and
  background otherwise. An object that the teacher is not sure of is therefore learned as background
  only in part. Only detections above ``SEMI.PSEUDO_LABEL_THRESHOLD`` train the boxes, and only they
  are objects for the RPN.
- **Mixed images** as in :mod:`.mixpl`.

Its config also has the augmentation of Unbiased Teacher, ``INPUT.AUGMENTATION_POLICY
UnbiasedTeacherPolicy``: each labeled image is used in a weak and a strong view. It turns on
variance voting (:mod:`locreweight.modeling.box_voting`) for detections, not for pseudo-labels.

PRC needs the teacher's prediction for each proposal of the student, and a proposal in a mixed image
is in no single image of the teacher. Soft labels need only the detections.

A limitation: NMS is per class, so a detection with a low score may lie on an object that has a
confident pseudo-label of another class. Proposals that overlap the former more get its soft label.
"""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.structures import Instances
from torch import Tensor

from ..losses.soft_labels import sharpen, soft_cross_entropy
from .base import METHOD_REGISTRY, LabelingInputs, SampledProposals, StudentImage
from .certainty import check_predicts_certainty, matched_certainty, to_labels_with_certainty
from .mixpl import MixPL


@METHOD_REGISTRY.register()
class LocReweightMix(MixPL):
    """LER for each coordinate, soft class labels and mixed images.

    The metric ``pseudo_labels/per_image`` also counts the pseudo-labels below the threshold.

    Attributes:
        min_score: detections with a higher score are pseudo-labels; the threshold if it is lower.
        temperature: of the soft labels, see :func:`~locreweight.losses.soft_labels.sharpen`.
    """

    min_score: float = 0.2
    temperature: float = 0.5
    further_fields = ("gt_score", "gt_certainty")

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        check_predicts_certainty(cfg)
        return super().from_config(cfg)

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

        Each proposal is weighted by :attr:`SampledProposals.image_weight`.
        """
        probability = sharpen(proposals.matched_gt_field("gt_score"), self.temperature)
        is_foreground = proposals.is_foreground
        proposals.log_mean("proposals/label_probability", probability, is_foreground)
        loss = soft_cross_entropy(proposals.predictions.scores, proposals.labels, probability)
        return (proposals.image_weight * loss).sum() / max(len(loss), 1)

    def box_loss(self, proposals: SampledProposals) -> Tensor:
        """Return the smooth L1 loss, each coordinate weighted by the teacher's certainty of it.

        Proposals that match a pseudo-label below the threshold have no loss, but count in the
        normalizer. Each proposal is also weighted by :attr:`SampledProposals.image_weight`.
        """
        foreground = proposals.foreground
        certainty = matched_certainty(proposals)
        is_confident = proposals.matched_gt_field("gt_score") > self.pseudo_label_threshold
        proposals.log_mean("proposals/above_threshold", is_confident, proposals.is_foreground)
        has_loss = proposals.is_foreground & is_confident
        proposals.log_mean("proposals/certainty", certainty.mean(dim=1), has_loss)
        weight = (proposals.image_weight * is_confident)[:, None] * certainty
        return (
            weight[foreground.rows] * proposals.smooth_l1_box_loss()
        ).sum() / foreground.normalizer
