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
from torch.nn import functional as F

from ..losses.localization import at_least_float32
from ..losses.reweighting import quality_weighted_box_loss
from ..modeling.meta_arch import SemiSupervisedRCNN, TeacherOutput
from .base import METHOD_REGISTRY, SampledProposals, SemiSupervisedMethod, select_pseudo_labels


@METHOD_REGISTRY.register()
def SoftTeacher(cfg: CfgNode) -> SemiSupervisedMethod:
    parts = SoftTeacherParts(class_threshold=cfg.SEMI.PSEUDO_LABEL_THRESHOLD)
    return SemiSupervisedMethod(
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

    def candidates(self, teacher: SemiSupervisedRCNN, seen: TeacherOutput) -> list[Instances]:
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
        is_object = sampled.matched_gt_field("gt_score") > self.class_threshold
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
        score = sampled.matched_gt_field("gt_score")
        variance = sampled.matched_gt_field("gt_variance")
        reliable = (score > self.box_threshold) & (variance < self.max_variance)
        sampled.measure("proposals/reliably_placed", reliable.float(), sampled.is_foreground)
        return reliable


def refine(
    teacher: SemiSupervisedRCNN, seen: TeacherOutput, boxes: list[Tensor], classes: list[Tensor]
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
    predictions = teacher.predict_rois(seen, boxes)
    proposals = [
        Instances(found.image_size, proposal_boxes=Boxes(b), gt_classes=c)
        for found, b, c in zip(seen.detections, boxes, classes, strict=True)
    ]
    predictor = teacher.roi_heads.box_predictor
    return list(predictor.predict_boxes_for_gt_classes(predictions, proposals))


# --------------------------------------------------------------------------------------------------
# How Soft Teacher weights pseudo-labels, for comparison.
#
# Xu et al., "End-to-End Semi-Supervised Object Detection with Soft Teacher" (2021), Sec. 3.2 and 3.3.
#
# Shapes:
#
#     N: number of proposals
#     P: number of pseudo-labels
#     J: number of jittered copies of each
#     K: number of foreground classes; class ``K`` is the background


def background_weighted_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    background_score: Tensor,
    *,
    per_sampled_proposal: bool = False,
) -> Tensor:
    """Unsupervised classification loss (Sec. 3.2 there): foreground mean plus weighted background.

    A background proposal weighs its share of the teacher's background scores: one that the teacher
    takes for an object which the pseudo-labels lack hardly counts.

    Args:
        logits: ``(N, K+1)`` the student's class scores before softmax.
        labels: ``(N,)`` assigned classes in ``[0, K]``.
        background_score: ``(N,)`` the teacher's background probability of each proposal.
        per_sampled_proposal: divide the whole sum by all weights together, those of foreground
            being 1, as the authors' program does, and not each part by its own. The equal say that
            foreground has otherwise can drown a weak detector in false objects.

    Returns:
        Scalar; the part of an empty set is an exact zero that keeps the graph.
    """
    loss = F.cross_entropy(at_least_float32(logits), labels, reduction="none")
    foreground = labels < logits.shape[1] - 1
    score = torch.where(foreground, 0, at_least_float32(background_score.detach()))
    if per_sampled_proposal:
        weight = score + foreground
        return (weight * loss).sum() / weight.sum().clamp(min=1)
    weight = score / score.sum().clamp(min=torch.finfo(score.dtype).tiny)
    foreground_mean = (loss * foreground).sum() / foreground.sum().clamp(min=1)
    return foreground_mean + (weight * loss).sum()


def jittered(boxes: Tensor, copies: int, scale: float) -> Tensor:
    """Copies of boxes, each coordinate moved by up to ``scale`` of the box's width or height.

    Args:
        boxes: ``(P, 4)`` xyxy in absolute pixels of any view.
        copies: J.
        scale: largest share; the moves are drawn uniformly from torch's generator.

    Returns:
        ``(P, J, 4)`` xyxy in the same frame; may reach over its border.
    """
    size = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)[:, None]
    moves = torch.rand(len(boxes), copies, 4, device=boxes.device, dtype=boxes.dtype) * 2 - 1
    return boxes[:, None] + scale * size * moves


def box_regression_variance(boxes: Tensor, refined: Tensor) -> Tensor:
    """How far re-predictions from jittered boxes disagree (Sec. 3.3 there).

    Args:
        boxes: ``(P, 4)`` pseudo-labels, xyxy in absolute pixels.
        refined: ``(P, J, 4)`` what the teacher regresses their jittered copies to; J at least 2.

    Returns:
        ``(P,)`` mean over the coordinates of the standard deviation among the J, in units of half
        of the box's width plus height.
    """
    width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(dim=1)
    unit = 0.5 * (width + height)
    # Written out: torch's std warns where there is no box.
    squared = (refined - refined.mean(dim=1, keepdim=True)).square()
    deviation = (squared.sum(dim=1) / (refined.shape[1] - 1)).sqrt()
    return deviation.mean(dim=1) / unit.clamp(min=torch.finfo(unit.dtype).tiny)
