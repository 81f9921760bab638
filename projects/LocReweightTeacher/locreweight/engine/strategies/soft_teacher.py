"""Soft Teacher: background weighted by the teacher, boxes by whether it agrees with itself.

Xu et al., "End-to-End Semi-Supervised Object Detection with Soft Teacher" (2021). Detections above
a low score are candidates; those above ``SEMI.PSEUDO_LABEL_THRESHOLD`` are objects for
classification and the RPN, those whose jittered copies are regressed to the same box are targets of
box regression.

Differences: proposals are sampled once, against all candidates, and not once for each of the two
losses. In the strong view one of translation, rotation and shear is drawn, each alike often, where
the authors' program draws one of translation along x, along y, rotation and shear; translation is
along both axes and shear along one, not the other way round; and operations have a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from torch import Tensor

from ...method.reweighting import quality_weighted_box_loss
from ...method.soft_teacher import (
    background_weighted_cross_entropy,
    box_regression_variance,
    jittered,
)
from ...modeling.detector import SemiSupervisedRCNN, TeacherView
from .strategy import STRATEGY_REGISTRY, SampledProposals, Strategy, select_pseudo_labels


@STRATEGY_REGISTRY.register()
def SoftTeacher(cfg: CfgNode) -> Strategy:
    parts = SoftTeacherParts(class_threshold=cfg.SEMI.PSEUDO_LABEL_THRESHOLD)
    return Strategy(
        choose_pseudo_labels=parts.candidates,
        classify=parts.classify,
        regress_boxes=parts.regress_boxes,
        for_rpn=parts.objects,
    )


@dataclass(frozen=True)
class SoftTeacherParts:
    """Soft Teacher's three decisions, with its published values.

    Attributes:
        class_threshold: score above which a candidate is an object; 0.9 as published.
        box_threshold: score above which a detection is a candidate for box regression.
        jitters: copies of a candidate that the teacher regresses again.
        jitter_scale: how far their coordinates are moved, as a share of the box's size.
        max_variance: of the re-predictions of a box that is regressed to.
    """

    class_threshold: float
    box_threshold: float = 0.5
    jitters: int = 10
    jitter_scale: float = 0.06
    max_variance: float = 0.02

    def candidates(self, teacher: SemiSupervisedRCNN, seen: TeacherView) -> list[Instances]:
        """All that one of the two losses may use, with ``gt_variance`` (Sec. 3.3 there)."""
        threshold = min(self.box_threshold, self.class_threshold)
        found = [select_pseudo_labels(x, threshold) for x in seen.detections]
        copies = [jittered(x.gt_boxes.tensor, self.jitters, self.jitter_scale) for x in found]
        classes = [x.gt_classes.repeat_interleave(self.jitters) for x in found]
        refined = refine(teacher, seen, [c.flatten(0, 1) for c in copies], classes)
        for x, again in zip(found, refined, strict=True):
            x.gt_variance = box_regression_variance(
                x.gt_boxes.tensor, again.unflatten(0, (-1, self.jitters))
            )
        return found

    def objects(self, labels: Instances) -> Instances:
        """The candidates that are objects for classification."""
        return labels[labels.gt_score > self.class_threshold]

    def classify(self, sampled: SampledProposals) -> Tensor:
        """Background weighted by the teacher's background scores (Sec. 3.2 there)."""
        is_object = sampled.of_pseudo_label("gt_score") > self.class_threshold
        background_class = sampled.predictor.num_classes
        labels = torch.where(is_object, sampled.labels, background_class)
        background = sampled.teacher_predictions.scores.float().softmax(dim=1)[:, -1]
        sampled.measure("proposals/background_score", background, labels == background_class)
        return background_weighted_cross_entropy(
            sampled.predictions.scores,
            labels,
            background,
            per_sampled_proposal=sampled.predictor.normalize_by_sampled,
        )

    def regress_boxes(self, sampled: SampledProposals) -> Tensor:
        """Mean over the proposals whose pseudo-label is reliably placed (or over all sampled)."""
        predictor = sampled.predictor
        boxes = predictor.foreground(sampled.predictions, sampled.proposals, sampled.labels)
        reliable = self._is_reliable(sampled)[boxes.rows].float()
        by_sampled = predictor.normalize_by_sampled
        normalizer = len(sampled.labels) if by_sampled else reliable.sum()
        return quality_weighted_box_loss(predictor.box_losses(boxes), reliable, normalizer)

    def _is_reliable(self, sampled: SampledProposals) -> Tensor:
        score = sampled.of_pseudo_label("gt_score")
        variance = sampled.of_pseudo_label("gt_variance")
        reliable = (score > self.box_threshold) & (variance < self.max_variance)
        sampled.measure("proposals/reliably_placed", reliable.float(), sampled.is_foreground)
        return reliable


def refine(
    teacher: SemiSupervisedRCNN, seen: TeacherView, boxes: list[Tensor], classes: list[Tensor]
) -> list[Tensor]:
    """What the teacher regresses boxes to.

    Args:
        teacher: in evaluation mode.
        seen: what it saw of N images.
        boxes: per image ``(R_i, 4)`` xyxy, absolute pixels of the weak view.
        classes: per image ``(R_i,)`` whose box branch to ask.

    Returns:
        per image ``(R_i, 4)`` xyxy in the same frame.
    """
    predictions = teacher.look_again(seen, boxes)
    proposals = [
        Instances(found.image_size, proposal_boxes=Boxes(b), gt_classes=c)
        for found, b, c in zip(seen.detections, boxes, classes, strict=True)
    ]
    predictor = teacher.roi_heads.box_predictor
    return list(predictor.predict_boxes_for_gt_classes(predictions, proposals))
