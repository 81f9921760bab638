"""LabelMatch: class thresholds that give pseudo-labels the class frequencies of the labeled images.

Chen et al., "Label Matching Semi-Supervised Object Detection" (2022). If labeled images have
``k_c`` objects of class ``c`` on average, the ``n * k_c`` detections with the highest scores in
``n`` unlabeled images are taken for objects of this class. The best fifth of them are reliable and
are learned as hard labels. From the others the student learns the class probabilities that the
teacher gives each proposal.

Differences from the authors' code:

- Thresholds follow from the detections and labeled objects of the training batches, and are
  recomputed after each 10000 unlabeled images, and at least 20 times in a training. The authors run
  the teacher on 10000 other unlabeled images every 1000 iterations, and count all labeled objects
  once.
- Proposals are assigned to reliable and uncertain pseudo-labels at once, to the one with the
  largest overlap. There they are assigned to the reliable ones first.
- Uncertain pseudo-labels do not become reliable if the teacher confirms them with the student's
  proposals ("mining" in the authors' code).
- ``INPUT.AUGMENTATION_POLICY UnbiasedTeacherPolicy`` gives two views of each labeled image, the
  strong one with erased areas. There is one, without erased areas. Both views of an unlabeled image
  have the same size, there each has a random one.
- Box losses are smooth L1 with regressors for each class. There they are L1 with one regressor for
  all classes.
"""

from __future__ import annotations

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import cat
from detectron2.structures import Instances
from torch import Tensor
from torch.nn import functional as F

from ..errors import UsageError
from ..losses.localization import at_least_float32
from .base import (
    METHOD_REGISTRY,
    LabelingInputs,
    SampledProposals,
    SemiSupervisedMethod,
    to_pseudo_labels,
)


@METHOD_REGISTRY.register()
class LabelMatch(SemiSupervisedMethod):
    """LabelMatch with its published values.

    Until the thresholds are computed for the first time, all classes have
    ``SEMI.PSEUDO_LABEL_THRESHOLD``, and all pseudo-labels are reliable.

    Attributes:
        reliable_share: share of the expected objects that are reliable.
        min_threshold: lowest threshold.
        temperature: divisor of the teacher's logits, which sharpens its probabilities.
        thresholds: ``(2, K)``. Detections with scores of at least ``thresholds[1]`` are
            pseudo-labels; those of at least ``thresholds[0]`` are reliable.
    """

    reliable_share: float = 0.2
    min_threshold: float = 0.05
    temperature: float = 0.5

    @configurable
    def __init__(self, *, num_classes: int, images: int, **kwargs: object) -> None:
        """
        Args:
            num_classes: K.
            images: number of unlabeled images from which thresholds are computed.
            kwargs: arguments of :class:`SemiSupervisedMethod`.
        """
        super().__init__(**kwargs)
        self.images = images
        self.thresholds = torch.full((2, num_classes), self.pseudo_label_threshold)
        self._statistics: list[dict] = []  # observations since the last thresholds

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        images = cfg.SEMI.LABEL_MATCH.IMAGES
        if images < 0:
            raise UsageError(
                f"SEMI.LABEL_MATCH.IMAGES is {images}; set a positive number, or 0 to choose it"
            )
        arguments = {
            "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "images": images or _images_per_update(cfg),
        }
        return super().from_config(cfg) | arguments

    def select_pseudo_labels(self, inputs: LabelingInputs) -> list[Instances]:
        """Select reliable and uncertain pseudo-labels; adds ``gt_is_reliable``, 0 or 1."""
        selected = []
        class_thresholds = self.thresholds.to(inputs.output.detections[0].scores.device)
        for detections in inputs.output.detections:
            thresholds = class_thresholds[:, detections.pred_classes]
            is_label = detections.scores >= thresholds[1]
            rows = is_label.nonzero().squeeze(1)
            labels = to_pseudo_labels(detections[rows], 0.0)
            labels.gt_is_reliable = (labels.gt_score >= thresholds[0, rows]).float()
            selected.append(labels)
        return selected

    def classification_loss(self, proposals: SampledProposals) -> Tensor:
        """Cross-entropy to hard labels, and to the teacher for uncertain pseudo-labels."""
        is_uncertain = proposals.is_foreground & (proposals.matched_gt_field("gt_is_reliable") == 0)
        proposals.log_mean("proposals/uncertain", is_uncertain.float(), proposals.is_foreground)
        logits = at_least_float32(proposals.predictions.scores)
        teacher_logits = at_least_float32(proposals.teacher_predictions.scores)
        soft_labels = (teacher_logits / self.temperature).softmax(dim=1)
        soft = F.cross_entropy(logits, soft_labels, reduction="none")
        hard = F.cross_entropy(logits, proposals.labels, reduction="none")
        return torch.where(is_uncertain, soft, hard).sum() / max(len(logits), 1)

    def box_loss(self, proposals: SampledProposals) -> Tensor:
        """Regress to reliable pseudo-labels only."""
        return proposals.weighted_box_loss(proposals.matched_gt_field("gt_is_reliable"))

    # The thresholds

    def observe(self, inputs: LabelingInputs, pseudo_labels: list[Instances]) -> dict:
        """Scores and classes of all detections, and the number of labeled objects per class."""
        detections = inputs.output.detections
        objects = cat([x["instances"].gt_classes for x in inputs.labeled]).cpu()
        return {
            "images": len(detections),
            "scores": cat([x.scores for x in detections]).float().cpu(),
            "classes": cat([x.pred_classes for x in detections]).cpu(),
            "labeled_images": len(inputs.labeled),
            "objects": objects.bincount(minlength=self.thresholds.shape[1]),
        }

    def update_state(self, observations: list[dict]) -> None:
        self._statistics += observations
        images = sum(x["images"] for x in self._statistics)
        if images < self.images:
            return
        objects = torch.stack([x["objects"] for x in self._statistics]).sum(dim=0)
        labeled_images = sum(x["labeled_images"] for x in self._statistics)
        # A class without labeled objects counts as if it had one, as in the authors' code.
        expected = objects.clamp(min=1).double() * images / labeled_images
        scores = cat([x["scores"] for x in self._statistics])
        classes = cat([x["classes"] for x in self._statistics])
        ranks = torch.stack([self.reliable_share * expected, expected]).long()
        self.thresholds = score_at_rank(scores, classes, ranks).clamp(min=self.min_threshold)
        self._statistics = []

    def state_dict(self) -> dict:
        return {"thresholds": self.thresholds, "statistics": list(self._statistics)}

    def load_state_dict(self, state_dict: dict) -> None:
        self.thresholds = state_dict["thresholds"]
        self._statistics = list(state_dict["statistics"])


def _images_per_update(cfg: CfgNode) -> int:
    """Choose the number of unlabeled images from which thresholds are computed.

    As published, or a twentieth of the unlabeled images that the training uses if that is fewer.
    Otherwise a short training would end before it has thresholds.
    """
    iterations = max((cfg.SOLVER.MAX_ITER - cfg.SEMI.BURN_IN_ITERS) // 20, 1)
    return min(10_000, max(iterations * cfg.SOLVER.IMS_PER_BATCH_UNLABELED, 1))


def score_at_rank(scores: Tensor, classes: Tensor, ranks: Tensor) -> Tensor:
    """Return the scores at given ranks of each class.

    Args:
        scores, classes: ``(N,)`` of detections.
        ranks: ``(T, K)`` ranks for each class; 0 is the highest score.

    Returns:
        ``(T, K)``. The lowest score if a class has too few detections, 0 if it has none.
    """
    result = torch.zeros(ranks.shape)
    for k in range(ranks.shape[1]):
        ordered = scores[classes == k].sort(descending=True).values
        if len(ordered):
            result[:, k] = ordered[ranks[:, k].clamp(max=len(ordered) - 1)]
    return result
