"""What a semi-supervised method decides: which pseudo-labels, and how they are learned from.

Shapes:

    R: the student's sampled proposals of all unlabeled images of a batch together
    K: foreground classes; class K is the background
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from detectron2.config import CfgNode
from detectron2.layers import cat
from detectron2.structures import Instances
from detectron2.utils.registry import Registry
from torch import Tensor

from ..errors import UsageError
from ..modeling.meta_arch import SemiSupervisedRCNN, TeacherOutput
from ..modeling.output_layers import BoxPredictions, LocalizationAwareOutputLayers

METHOD_REGISTRY = Registry("METHOD")
METHOD_REGISTRY.__doc__ = "Functions from a config to a :class:`SemiSupervisedMethod`."


@dataclass(frozen=True)
class SampledProposals:
    """The student's proposals on unlabeled images, and all that is known of them.

    Attributes:
        proposals: per image, xyxy in absolute pixels of the strong view, with the ``gt_*`` fields
            of the pseudo-labels that they are matched to.
        predictions: what the student predicts for them.
        predictor: the student's output layers, which know its losses.
        predict_rois: asks the teacher for its predictions at the same places of the weak view; None
            of its time is spent if a method does not ask.
        metrics: scalars to be logged, which a method may add to.
    """

    proposals: list[Instances]
    predictions: BoxPredictions
    predictor: LocalizationAwareOutputLayers
    predict_rois: Callable[[], BoxPredictions]
    metrics: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def labels(self) -> Tensor:
        """``(R,)`` the class of the pseudo-label that each is matched to, K for background."""
        return cat([p.gt_classes for p in self.proposals])

    @cached_property
    def is_foreground(self) -> Tensor:
        """``(R,)`` bool."""
        return self.labels < self.predictor.num_classes

    @cached_property
    def teacher_predictions(self) -> BoxPredictions:
        """The teacher's, asked for once."""
        return self.predict_rois()

    def matched_gt_field(self, name: str) -> Tensor:
        """``(R,)`` a ``gt_*`` field of each proposal's pseudo-label; zero where there is none."""
        parts = []
        for p in self.proposals:
            # An image without pseudo-labels gives its proposals no gt_ field but their class.
            known = p.has(name)
            parts.append(p.get(name).float() if known else torch.zeros_like(p.gt_classes).float())
        return cat(parts)

    def measure(self, name: str, values: Tensor, where: Tensor) -> None:
        """Log the mean of ``(R,)`` values over chosen proposals; NaN if none is chosen."""
        # Not a mean over selected rows: selecting would wait for the device.
        self.metrics[name] = (values.detach() * where).sum() / where.sum()


@dataclass(frozen=True)
class SemiSupervisedMethod:
    """A semi-supervised method, in the parts in which methods differ.

    Attributes:
        choose_pseudo_labels: ``(teacher, what it saw) -> per image Instances``, in the frame of the
            weak view: ``gt_boxes``, ``gt_classes``, ``gt_localization_quality``, and whatever
            further ``gt_*`` fields the losses ask for.
        classify: ``sampled proposals -> scalar``, the unsupervised classification loss.
        regress_boxes: the same for the unsupervised box loss; None for no such loss.
        for_rpn: the pseudo-labels that the proposal network learns from; None for all of them.
        frozen_pseudo_labeler: pseudo-labels come from the teacher as it was at the end of burn-in, and not
            from the one that goes on as the student's average.
    """

    choose_pseudo_labels: Callable[[SemiSupervisedRCNN, TeacherOutput], list[Instances]]
    classify: Callable[[SampledProposals], Tensor]
    regress_boxes: Callable[[SampledProposals], Tensor] | None
    for_rpn: Callable[[Instances], Instances] | None = None
    frozen_pseudo_labeler: bool = False

    def losses(self, sampled: SampledProposals) -> dict[str, Tensor]:
        """``loss_cls`` and, if there is one, ``loss_box_reg`` on pseudo-labels, before beta."""
        losses = {"loss_cls": self.classify(sampled)}
        if self.regress_boxes is not None:
            losses["loss_box_reg"] = self.regress_boxes(sampled)
        return losses


def build_method(cfg: CfgNode) -> SemiSupervisedMethod:
    """The strategy that ``SEMI.METHOD`` names.

    Raises:
        UsageError: for an unknown name.
    """
    known = [name for name, _ in METHOD_REGISTRY]
    if cfg.SEMI.METHOD not in known:
        raise UsageError(f"unknown SEMI.METHOD {cfg.SEMI.METHOD!r}; known are {', '.join(known)}")
    return METHOD_REGISTRY.get(cfg.SEMI.METHOD)(cfg)


# -- parts that several methods share -------------------------------------------------------------


@dataclass(frozen=True)
class AboveThreshold:
    """Pseudo-labels are the teacher's detections above a score, after NMS (Sec. 3.1)."""

    threshold: float

    def __call__(self, teacher: SemiSupervisedRCNN, seen: TeacherOutput) -> list[Instances]:
        return [select_pseudo_labels(found, self.threshold) for found in seen.detections]


def select_pseudo_labels(detections: Instances, threshold: float) -> Instances:
    """The detections above the score threshold, as ground truth for the student.

    Args:
        detections: of one image, after NMS.
        threshold: on the class probability.

    Returns:
        ``gt_boxes`` (frame of the detections), ``gt_classes``, ``gt_localization_quality``,
        ``gt_score``.
    """
    # Places, and not a mask, which each field would count for itself.
    chosen = detections[(detections.scores > threshold).nonzero().squeeze(1)]
    return Instances(
        detections.image_size,
        gt_boxes=chosen.pred_boxes,
        gt_classes=chosen.pred_classes,
        gt_localization_quality=chosen.localization_quality,
        gt_score=chosen.scores,
    )


def unweighted_classification_loss(sampled: SampledProposals) -> Tensor:
    """The detector's own classification loss: all proposals count alike."""
    return sampled.predictor.classification_loss(sampled.predictions.scores, sampled.labels)


def unweighted_box_loss(sampled: SampledProposals) -> Tensor:
    """The box loss with all foreground proposals counting alike."""
    boxes = sampled.predictor.foreground(sampled.predictions, sampled.proposals, sampled.labels)
    normalizer = sampled.predictor.normalizer(boxes, sampled.labels)
    return sampled.predictor.box_losses(boxes).sum() / normalizer
