"""Soft Teacher: weight background by the teacher's score, regress only to stable boxes.

Xu et al., "End-to-End Semi-Supervised Object Detection with Soft Teacher" (2021). Section numbers
are that paper's. Detections above a low score are candidates. For the classification loss and the
RPN, candidates above ``SEMI.PSEUDO_LABEL_THRESHOLD`` are objects. For the box loss, candidates are
used whose jittered copies the teacher regresses to nearly the same box.

Differences from the paper:

- Proposals are sampled once, against all candidates, not once for each of the two losses.
- The strong view draws one of translation, rotation and shear with equal probability. The authors'
  code draws one of translation along x, translation along y, rotation and shear. Here translation
  is along both axes and shear along one; there it is the reverse.
- Operations are applied in a fixed order.

Shapes:

    N: number of proposals
    P: number of pseudo-labels
    J: number of jittered copies of each pseudo-label
    K: number of foreground classes; class ``K`` is the background
"""

from __future__ import annotations

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torch.nn import functional as F

from ..losses.localization import at_least_float32
from ..losses.reweighting import quality_weighted_box_loss
from ..modeling.meta_arch import SemiSupervisedRCNN, TeacherOutput
from .base import (
    METHOD_REGISTRY,
    LabelingInputs,
    SampledProposals,
    SemiSupervisedMethod,
    to_pseudo_labels,
)


@METHOD_REGISTRY.register()
class SoftTeacher(SemiSupervisedMethod):
    """Soft Teacher with its published values.

    Attributes:
        candidate_threshold: a detection above this score is a candidate for box regression.
        num_jitters: number of jittered copies of each candidate that the teacher regresses.
        jitter_scale: maximum jitter of a coordinate, as a fraction of the box's width or height.
        max_variance: a candidate is a target of box regression if the variance of its regressed
            copies is below this.
    """

    candidate_threshold: float = 0.5
    num_jitters: int = 10
    jitter_scale: float = 0.06
    max_variance: float = 0.02

    def select_pseudo_labels(self, inputs: LabelingInputs) -> list[Instances]:
        """Select all candidates that one of the losses can use; adds ``gt_variance`` (Sec. 3.3)."""
        threshold = min(self.candidate_threshold, self.pseudo_label_threshold)
        candidates = [to_pseudo_labels(x, threshold) for x in inputs.output.detections]
        copies = [
            jitter_boxes(x.gt_boxes.tensor, self.num_jitters, self.jitter_scale) for x in candidates
        ]
        classes = [x.gt_classes.repeat_interleave(self.num_jitters) for x in candidates]
        regressed = regress_boxes(
            inputs.teacher, inputs.output, [boxes.flatten(0, 1) for boxes in copies], classes
        )
        for labels, boxes in zip(candidates, regressed, strict=True):
            labels.gt_variance = box_regression_variance(
                labels.gt_boxes.tensor, boxes.unflatten(0, (-1, self.num_jitters))
            )
        return candidates

    def rpn_labels(self, pseudo_labels: Instances) -> Instances:
        """Return the candidates that are objects."""
        return pseudo_labels[pseudo_labels.gt_score > self.pseudo_label_threshold]

    def classification_loss(self, proposals: SampledProposals) -> Tensor:
        """Weight background proposals by the teacher's background score (Sec. 3.2)."""
        box_predictor = proposals.box_predictor
        is_object = proposals.matched_gt_field("gt_score") > self.pseudo_label_threshold
        labels = torch.where(is_object, proposals.labels, box_predictor.num_classes)
        background_score = proposals.teacher_predictions.probabilities[:, -1]
        is_background = labels == box_predictor.num_classes
        proposals.log_mean("proposals/background_score", background_score, is_background)
        return background_weighted_cross_entropy(
            proposals.predictions.scores,
            labels,
            background_score,
            per_sampled_proposal=box_predictor.normalize_by_sampled,
        )

    def box_loss(self, proposals: SampledProposals) -> Tensor:
        """Regress to candidates with a low variance (Sec. 3.3).

        The mean is over the proposals with such a target, or over all sampled proposals if
        ``SEMI.NORMALIZE_BY_SAMPLED`` is set.
        """
        score = proposals.matched_gt_field("gt_score")
        variance = proposals.matched_gt_field("gt_variance")
        reliable = (score > self.candidate_threshold) & (variance < self.max_variance)
        proposals.log_mean("proposals/reliably_placed", reliable.float(), proposals.is_foreground)

        weight = reliable[proposals.foreground.rows].float()
        by_sampled = proposals.box_predictor.normalize_by_sampled
        normalizer = len(proposals.labels) if by_sampled else weight.sum()
        return quality_weighted_box_loss(proposals.smooth_l1_box_loss(), weight, normalizer)


def regress_boxes(
    teacher: SemiSupervisedRCNN,
    teacher_output: TeacherOutput,
    boxes: list[Tensor],
    classes: list[Tensor],
) -> list[Tensor]:
    """Apply the teacher's box regression to boxes of given classes.

    Args:
        teacher: the model that made the output, in evaluation mode.
        teacher_output: its features and detections in a list of images.
        boxes: for each image ``(R_i, 4)`` xyxy, absolute pixels, weak view.
        classes: for each image ``(R_i,)`` class whose regressor is used.

    Returns:
        For each image ``(R_i, 4)`` xyxy in the same frame.
    """
    predictions = teacher.predict_rois(teacher_output, boxes)
    proposals = [
        Instances(x.image_size, proposal_boxes=Boxes(image_boxes), gt_classes=image_classes)
        for x, image_boxes, image_classes in zip(
            teacher_output.detections, boxes, classes, strict=True
        )
    ]
    box_predictor = teacher.roi_heads.box_predictor
    return list(box_predictor.predict_boxes_for_gt_classes(predictions, proposals))


def background_weighted_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    background_score: Tensor,
    *,
    per_sampled_proposal: bool = False,
) -> Tensor:
    """Compute the unsupervised classification loss (Sec. 3.2).

    It is the mean loss of the foreground proposals plus a weighted mean of the background
    proposals. The weight of a background proposal is the teacher's background score, divided by
    the sum of these scores. A proposal that the teacher considers an object, although no
    pseudo-label covers it, therefore has little weight.

    Args:
        logits: ``(N, K+1)`` the student's class scores before softmax.
        labels: ``(N,)`` assigned classes in ``[0, K]``.
        background_score: ``(N,)`` the teacher's background probability of each proposal.
        per_sampled_proposal: divide the whole sum by the sum of all weights, where the weight of a
            foreground proposal is 1, as the authors' code does. Otherwise each of the two parts is
            divided by its own weights. Foreground and background then count the same, and a weak
            detector can drown in false objects.

    Returns:
        Scalar. The part of an empty set is an exact zero that keeps the graph.
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


def jitter_boxes(boxes: Tensor, copies: int, scale: float) -> Tensor:
    """Copy boxes and move each coordinate by a random fraction of the box's width or height.

    Args:
        boxes: ``(P, 4)`` xyxy, absolute pixels.
        copies: J.
        scale: largest fraction. Fractions are uniform, drawn from torch's default generator.

    Returns:
        ``(P, J, 4)`` xyxy in the same frame. Boxes can extend beyond the image.
    """
    size = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)[:, None]
    offsets = torch.rand(len(boxes), copies, 4, device=boxes.device, dtype=boxes.dtype) * 2 - 1
    return boxes[:, None] + scale * size * offsets


def box_regression_variance(boxes: Tensor, regressed: Tensor) -> Tensor:
    """Compute how much the boxes regressed from jittered copies differ (Sec. 3.3).

    Args:
        boxes: ``(P, 4)`` pseudo-labels, xyxy, absolute pixels.
        regressed: ``(P, J, 4)`` boxes regressed from the J copies of each; J is at least 2.

    Returns:
        ``(P,)`` standard deviation over the J boxes, averaged over the coordinates and divided by
        half the sum of the pseudo-label's width and height.
    """
    width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(dim=1)
    unit = 0.5 * (width + height)
    # Not torch.std, which warns if there are no boxes.
    squared = (regressed - regressed.mean(dim=1, keepdim=True)).square()
    deviation = (squared.sum(dim=1) / (regressed.shape[1] - 1)).sqrt()
    return deviation.mean(dim=1) / unit.clamp(min=torch.finfo(unit.dtype).tiny)
