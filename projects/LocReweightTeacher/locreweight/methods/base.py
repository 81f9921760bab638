"""Base class of semi-supervised methods.

Shapes:

    R: number of sampled proposals, all unlabeled images of a batch together
    F: number of foreground proposals among them
    K: number of foreground classes; class ``K`` is the background
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from detectron2.config import CfgNode, configurable
from detectron2.layers import cat
from detectron2.structures import Instances
from detectron2.utils.registry import Registry
from torch import Tensor, nn, zeros_like

from ..data.transforms.views import UnlabeledSample
from ..errors import UsageError, get_registered
from ..losses.reweighting import quality_weighted_box_loss
from ..modeling.building import build_detector
from ..modeling.committee import Committee
from ..modeling.meta_arch import BackboneMixing, SemiSupervisedRCNN, TeacherOutput
from ..modeling.output_layers import (
    BoxPredictions,
    ForegroundBoxes,
    LocalizationAwareOutputLayers,
)

METHOD_REGISTRY = Registry("METHOD")
METHOD_REGISTRY.__doc__ = "Subclasses of :class:`SemiSupervisedMethod`, built from a config."


def build_method(cfg: CfgNode) -> SemiSupervisedMethod:
    """Build the method that ``SEMI.METHOD`` names.

    Raises:
        UsageError: if no method of this name is registered, or the method cannot be used with other
            keys of the config.
    """
    method = get_registered(METHOD_REGISTRY, "SEMI.METHOD", cfg.SEMI.METHOD)
    for key in ("LER", "PRC"):
        if not (cfg.SEMI[key] or method.has_ler_and_prc):
            raise UsageError(
                f"SEMI.{key} False has no effect with SEMI.METHOD {cfg.SEMI.METHOD}: set it to "
                "True, or SEMI.METHOD to LocReweight"
            )
    return method(cfg)


def build_members(cfg: CfgNode, method: SemiSupervisedMethod) -> nn.Module:
    """Build the students or the teachers of a method, with random weights.

    Returns:
        a detector, or a :class:`Committee` of several with different weights.

    Raises:
        UsageError: if the config does not describe a detector.
    """
    members = [build_detector(cfg) for _ in range(method.num_members)]
    method.prepare_members(members)
    return members[0] if len(members) == 1 else Committee(members)


@dataclass(frozen=True)
class LabelingInputs:
    """What pseudo-labels are made from.

    Attributes:
        teacher: the model that made the output, in evaluation mode.
        output: its features and detections in N weak views.
        samples: the N images: file names, and views with their matrices. The strong views are those
            of this member's student.
        labeled: the labeled images of the batch of this process, in Detectron2's format; their
            ``instances`` are on the CPU.
        member: index of the teacher, for methods with several.
    """

    teacher: SemiSupervisedRCNN
    output: TeacherOutput
    samples: list[UnlabeledSample]
    labeled: list[dict] = field(default_factory=list)
    member: int = 0


@dataclass(frozen=True)
class StudentImage:
    """An unlabeled image as the student sees it.

    Attributes:
        image: ``(3, H, W)`` pixel values in [0, 255], channels in the order of ``INPUT.FORMAT``.
        pseudo_labels: with ``gt_boxes`` (xyxy, absolute pixels of the image), ``gt_classes`` and
            further ``gt_*`` fields.
        sample: the views whose strong view this is; None for an image mixed from several.
        loss_weight: factor on the RPN's losses in this image, before the mean over images. A method
            that uses it applies :attr:`SampledProposals.image_weight` to the losses of the ROI
            head.
    """

    image: Tensor
    pseudo_labels: Instances
    sample: UnlabeledSample | None
    loss_weight: float = 1.0


@dataclass(frozen=True)
class SampledProposals:
    """The student's sampled proposals in the unlabeled images.

    Attributes:
        instances: one ``Instances`` per image with ``proposal_boxes`` (xyxy, absolute pixels,
            student's image), ``gt_classes``, and the ``gt_*`` fields of the matched pseudo-labels.
        predictions: the student's predictions for all proposals.
        box_predictor: the student's output layers.
        predict_rois: returns the teacher's predictions for the same proposals, projected to the
            weak view. Called at most once, and only if the method uses them.
        loss_weights: :attr:`StudentImage.loss_weight` of each image.
        metrics: scalars to log, by name. Methods may add to them.
    """

    instances: list[Instances]
    predictions: BoxPredictions
    box_predictor: LocalizationAwareOutputLayers
    predict_rois: Callable[[], BoxPredictions]
    loss_weights: list[float] = field(default_factory=list)
    metrics: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def labels(self) -> Tensor:
        """``(R,)`` class of the matched pseudo-label, K for background."""
        return cat([x.gt_classes for x in self.instances])

    @cached_property
    def is_foreground(self) -> Tensor:
        """``(R,)`` bool."""
        return self.labels < self.box_predictor.num_classes

    @cached_property
    def foreground(self) -> ForegroundBoxes:
        """The foreground proposals: predicted and target boxes, and the normalizer of a loss."""
        return self.box_predictor.select_foreground(self.predictions, self.instances, self.labels)

    @cached_property
    def teacher_predictions(self) -> BoxPredictions:
        """The teacher's predictions for the proposals, in the same order."""
        return self.predict_rois()

    @property
    def image_weight(self) -> Tensor:
        """``(R,)`` loss weight of the image that each proposal is in."""
        pairs = zip(self.instances, self.loss_weights, strict=True)
        return cat([x.proposal_boxes.tensor.new_full((len(x),), weight) for x, weight in pairs])

    def smooth_l1_box_loss(self) -> Tensor:
        """``(F, 4)`` unreduced smooth L1 loss of the foreground proposals."""
        return self.box_predictor.smooth_l1_box_loss(self.foreground)

    def weighted_box_loss(self, weight: Tensor) -> Tensor:
        """Smooth L1 loss of the foreground proposals, each multiplied by its weight; a scalar.

        Args:
            weight: ``(R,)``; those of background proposals are not used.
        """
        foreground = self.foreground
        return quality_weighted_box_loss(
            self.smooth_l1_box_loss(), weight[foreground.rows], foreground.normalizer
        )

    def matched_gt_field(self, name: str) -> Tensor:
        """Return a ``gt_*`` field of the pseudo-label that each proposal is matched to.

        Returns:
            ``(R,)`` float32; 0 in images without pseudo-labels.
        """
        values = []
        for x in self.instances:
            # In an image without pseudo-labels, gt_classes is the only gt_* field of the proposals.
            values.append((x.get(name) if x.has(name) else zeros_like(x.gt_classes)).float())
        return cat(values)

    def log_mean(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Log the mean of ``(R,)`` values where the ``(R,)`` mask is true; NaN if it never is."""
        # Indexing with the mask would make the host wait for the device.
        self.metrics[name] = (values.detach() * mask).sum() / mask.sum()


class SemiSupervisedMethod:
    """Base class of semi-supervised methods.

    The base class is the plain teacher-student method: all detections of the teacher above
    ``SEMI.PSEUDO_LABEL_THRESHOLD`` are pseudo-labels, and all losses are unweighted. Subclasses
    override the parts in which they differ, and register themselves in ``METHOD_REGISTRY``.

    :func:`locreweight.engine.training_step.training_step` calls, in each iteration after burn-in,
    :meth:`select_for_members`, which calls :meth:`select_pseudo_labels`, then :meth:`observe`,
    :meth:`compose`, :meth:`rpn_labels` for each image, :meth:`backbone_mixing`, and :meth:`losses`.
    The trainer then calls :meth:`update_state`. With several members, all but
    :meth:`select_for_members` and :meth:`update_state` are called for each member.

    Attributes:
        num_members: number of students, and of teachers. Each student is trained on all images
            with separate losses, and each teacher is the moving average of one student. The first
            teacher is the result of training.
        own_strong_views: whether each member gets a separate strong view of an unlabeled image.
            Otherwise they share one.
        frozen_pseudo_labeler: if true, a copy of the teacher from the end of burn-in makes all
            pseudo-labels. Otherwise the current teacher makes them.
        further_images: number of images that :meth:`compose` adds, to estimate the memory.
        has_ler_and_prc: whether ``SEMI.LER`` and ``SEMI.PRC`` turn parts of the method on and off.
        pseudo_label_threshold: a detection is a pseudo-label if its score is above this.
    """

    num_members: int = 1
    own_strong_views: bool = False
    frozen_pseudo_labeler: bool = False
    further_images: int = 0
    has_ler_and_prc: bool = False

    @configurable
    def __init__(self, *, pseudo_label_threshold: float) -> None:
        self.pseudo_label_threshold = pseudo_label_threshold

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        return {"pseudo_label_threshold": cfg.SEMI.PSEUDO_LABEL_THRESHOLD}

    def select_pseudo_labels(self, inputs: LabelingInputs) -> list[Instances]:
        """Select pseudo-labels from the teacher's detections in N weak views (Sec. 3.1).

        Returns:
            N ``Instances`` in the frame of the weak view, with ``gt_boxes``, ``gt_classes``,
            ``gt_localization_quality`` and ``gt_score``. A subclass may add ``gt_*`` fields:
            :meth:`SampledProposals.matched_gt_field` makes them available to the losses.
        """
        threshold = self.pseudo_label_threshold
        return [to_pseudo_labels(x, threshold) for x in inputs.output.detections]

    def prepare_members(self, members: list[SemiSupervisedRCNN]) -> None:
        """Change newly built members, for example let them share a backbone. Default: unchanged.

        Called once for the students and once for the teachers. A module that members share must be
        the same object in all of them. The names of parameters must not change.
        """

    def select_for_members(self, inputs: list[LabelingInputs]) -> list[list[Instances]]:
        """Select the pseudo-labels of each student. By default, student i uses those of teacher i.

        Args:
            inputs: one for each teacher, all with the same weak views.

        Returns:
            for each student the pseudo-labels as returned by :meth:`select_pseudo_labels`.
        """
        return [self.select_pseudo_labels(x) for x in inputs]

    def compose(self, images: list[StudentImage], labeled: list[dict]) -> list[StudentImage]:
        """Compose the student's unlabeled images, for example by mixing. Default: unchanged.

        Args:
            images: the strong views, with the pseudo-labels projected to them.
            labeled: the labeled images of this process in Detectron2's format; their ``instances``
                are on the CPU.

        Returns:
            at least one image. Those that are still strong views are in the same places.
        """
        return images

    def rpn_labels(self, pseudo_labels: Instances) -> Instances:
        """Return the pseudo-labels of one image that the RPN is trained on. Default: all."""
        return pseudo_labels

    def backbone_mixing(self, num_images: int) -> BackboneMixing | None:
        """Return how the student's unlabeled images are mixed around the backbone. Default: not.

        Args:
            num_images: number of images that :meth:`compose` returned.
        """
        return None

    def classification_loss(self, proposals: SampledProposals) -> Tensor:
        """Return the unsupervised classification loss, a scalar. Default: unweighted."""
        scores = proposals.predictions.scores
        return proposals.box_predictor.classification_loss(scores, proposals.labels)

    def box_loss(self, proposals: SampledProposals) -> Tensor | None:
        """Return the unsupervised box loss, a scalar, or None for no loss. Default: unweighted."""
        return proposals.smooth_l1_box_loss().sum() / proposals.foreground.normalizer

    def losses(self, proposals: SampledProposals) -> dict[str, Tensor]:
        """Return the unsupervised losses by name, not yet multiplied by beta.

        A subclass may add losses of other names, which are multiplied by beta too.
        """
        losses = {"loss_cls": self.classification_loss(proposals)}
        box_loss = self.box_loss(proposals)
        if box_loss is not None:
            losses["loss_box_reg"] = box_loss
        return losses

    # State over iterations, the same in all processes and saved in checkpoints. Default: none.

    def observe(self, inputs: LabelingInputs, pseudo_labels: list[Instances]) -> object | None:
        """Return what the state is to learn from this process's part of a step.

        Args:
            inputs: as for :meth:`select_pseudo_labels`.
            pseudo_labels: those of the student of the same member, in the frame of the weak views.

        Returns:
            a picklable object with tensors on the CPU only, because it is sent to all processes;
            None if there is nothing to learn.
        """
        return None

    def update_state(self, observations: list) -> None:
        """Update the state at the end of a step.

        Args:
            observations: what :meth:`observe` returned in each process, in the order of the
                processes, and of the members within a process, without None; at least one. The
                state of a step that failed in any process is not updated.
        """

    def state_dict(self) -> dict:
        """Return the state as nested dicts and lists of numbers, strings and tensors."""
        return {}

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore a state returned by :meth:`state_dict`."""


def to_pseudo_labels(detections: Instances, score_threshold: float, **fields: Tensor) -> Instances:
    """Convert the detections above a score threshold to ground truth for the student.

    Args:
        detections: detections in one image, after NMS.
        score_threshold: threshold on the class probability.
        fields: further ``gt_*`` fields, each with one row for each detection.

    Returns:
        ``Instances`` in the frame of the detections, with ``gt_boxes``, ``gt_classes``,
        ``gt_localization_quality``, ``gt_score`` and the further fields.
    """
    # With a mask, each field would count the selected rows again and wait for the device.
    rows = (detections.scores > score_threshold).nonzero().squeeze(1)
    selected = detections[rows]
    return Instances(
        selected.image_size,
        gt_boxes=selected.pred_boxes,
        gt_classes=selected.pred_classes,
        gt_localization_quality=selected.localization_quality,
        gt_score=selected.scores,
        **{name: values[rows] for name, values in fields.items()},
    )
