"""One training step, from a batch of views to the losses (Fig. 2).

The teacher detects objects in the *weak* view of each unlabeled image. The method selects
pseudo-labels from these detections, which are projected to the *strong* view. The student is
trained on the labeled images and on the strong views. Some losses need the teacher's predictions
for the student's proposals; for these, the proposals are projected back to the weak view.

A method can have several members, each with a student and a teacher. The steps are then done for
each of them.

All boxes are xyxy in absolute pixels of the view that is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from detectron2.config import CfgNode
from detectron2.layers import cat
from detectron2.structures import Instances
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..data.loader import Batch
from ..data.transforms.views import UnlabeledSample, project_boxes, project_to_strong_view
from ..errors import UsageError
from ..methods import (
    LabelingInputs,
    SampledProposals,
    SemiSupervisedMethod,
    StudentImage,
    build_method,
)
from ..modeling.committee import Committee, members_of
from ..modeling.meta_arch import SemiSupervisedRCNN, TeacherOutput, UnlabeledOutput
from ..modeling.output_layers import BoxPredictions

UNLABELED_SUFFIX = "_unlabeled"
HIGHEST_SCORE = "pseudo_labels/highest_score"


@dataclass(frozen=True)
class StepSettings:
    """Settings of the training step.

    Attributes:
        method: selects the pseudo-labels and computes the losses on them.
        unsupervised_weight: beta of Eq. 3, the weight of all losses on unlabeled images.
        loss_weights: name of a loss -> further weight of this loss on unlabeled images. The default
            is 1. Losses on labeled images have no weight here.
    """

    method: SemiSupervisedMethod
    unsupervised_weight: float
    loss_weights: dict[str, float]

    @classmethod
    def from_config(cls, cfg: CfgNode) -> StepSettings:
        return cls(
            method=build_method(cfg),
            unsupervised_weight=cfg.SEMI.UNSUPERVISED_WEIGHT,
            loss_weights={
                "loss_box_reg": cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT,
                "loss_rpn_cls": float(cfg.SEMI.RPN_OBJECTNESS_LOSS),
                "loss_rpn_loc": float(cfg.SEMI.RPN_BOX_LOSS),
            },
        )

    def weight_of(self, name: str) -> float:
        """Return the weight of a loss on unlabeled images in the total loss."""
        return self.unsupervised_weight * self.loss_weights.get(name, 1.0)


@dataclass(frozen=True)
class StepResult:
    """Losses and metrics of one step.

    Attributes:
        losses: weighted scalar losses by name. Their sum is minimized.
        metrics: scalars to log, by name; NaN if there was nothing to measure.
        observations: what the method's state learns from this step, one for each member; None for a
            method without such a state.
    """

    losses: dict[str, Tensor]
    metrics: dict[str, Tensor]
    observations: list = field(default_factory=list)

    @property
    def total(self) -> Tensor:
        """``L = L_s + beta * L_u`` (Eq. 3)."""
        return torch.stack(list(self.losses.values())).sum()


def training_step(
    student: nn.Module, teacher: nn.Module, batch: Batch, settings: StepSettings
) -> StepResult:
    """Compute the losses of a batch (Eq. 3), or the supervised ones alone during burn-in.

    Args:
        student: a :class:`SemiSupervisedRCNN` in training mode or a :class:`Committee` of several,
            possibly wrapped in ``DistributedDataParallel``.
        teacher: the model that makes the pseudo-labels, in evaluation mode; a committee if the
            student is one.
        batch: the images of this process; without unlabeled images during burn-in.
        settings: from the config.
    """
    teachers = members_of(teacher)
    if not batch.unlabeled:
        outputs = _forward(student, [(batch.labeled,)] * len(teachers))
        return StepResult(_join_losses(outputs), {})
    method = settings.method

    # Teachers: weak views -> pseudo-labels, in the frame of the weak views.
    weak_views = [{"image": sample.weak.image} for sample in batch.unlabeled]
    inputs = [
        LabelingInputs(
            member,
            member.detect(weak_views),
            [sample.for_student(i) for sample in batch.unlabeled],
            batch.labeled,
            i,
        )
        for i, member in enumerate(teachers)
    ]
    selected = method.select_for_members(inputs)
    observations = [method.observe(*x) for x in zip(inputs, selected, strict=True)]

    # Students: labeled images and strong views -> supervised losses, sampled proposals.
    pseudo_labels = [
        [project_to_strong_view(*pair) for pair in zip(labels, x.samples, strict=True)]
        for x, labels in zip(inputs, selected, strict=True)
    ]
    images = [
        method.compose(
            [
                StudentImage(sample.strong.image, labels, sample)
                for sample, labels in zip(x.samples, member_labels, strict=True)
            ],
            batch.labeled,
        )
        for x, member_labels in zip(inputs, pseudo_labels, strict=True)
    ]
    outputs = _forward(student, [_student_inputs(method, batch, x) for x in images])

    # Method: sampled proposals -> unsupervised losses.
    losses, metrics = [], {}
    students = members_of(_unwrap(student))
    for i, (supervised, output) in enumerate(outputs):
        proposals = _sampled_proposals(students[i], inputs[i], images[i], output)
        unsupervised = output.rpn_losses | method.losses(proposals)
        losses.append(
            supervised
            | {
                name + UNLABELED_SUFFIX: settings.weight_of(name) * loss
                for name, loss in unsupervised.items()
            }
        )
        if i == 0:
            metrics = _metrics(inputs[i].output, pseudo_labels[i], proposals)
    return StepResult(_join_losses(losses), metrics, observations)


def _forward(student: nn.Module, inputs: list[tuple]) -> list:
    """Run each member of a student on its own arguments, in one forward pass."""
    if isinstance(_unwrap(student), Committee):
        return student(inputs)
    return [student(*inputs[0])]


def _student_inputs(
    method: SemiSupervisedMethod, batch: Batch, images: list[StudentImage]
) -> tuple:
    """Arguments of :meth:`SemiSupervisedRCNN.forward` for one member."""
    unlabeled = [
        {
            "image": x.image,
            "instances": x.pseudo_labels,
            "rpn_instances": method.rpn_labels(x.pseudo_labels),
            "loss_weight": x.loss_weight,
        }
        for x in images
    ]
    return batch.labeled, unlabeled, method.backbone_mixing(len(unlabeled))


def _sampled_proposals(
    student: SemiSupervisedRCNN,
    inputs: LabelingInputs,
    images: list[StudentImage],
    output: UnlabeledOutput,
) -> SampledProposals:
    return SampledProposals(
        output.proposals,
        output.predictions,
        student.roi_heads.box_predictor,
        predict_rois=lambda: predict_student_rois(
            inputs.teacher, inputs.output, output.proposals, [x.sample for x in images]
        ),
        loss_weights=[x.loss_weight for x in images],
    )


def _join_losses(members: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Join the losses of all members. From the second on, the number is appended to the name."""
    return {
        name if i == 0 else f"{name}_{i + 1}": loss
        for i, losses in enumerate(members)
        for name, loss in losses.items()
    }


def predict_student_rois(
    teacher: SemiSupervisedRCNN,
    teacher_output: TeacherOutput,
    proposals: list[Instances],
    samples: Sequence[UnlabeledSample | None],
) -> BoxPredictions:
    """Project the student's proposals to the weak views and predict there (Sec. 3.4).

    Args:
        teacher: the model that made the output, in evaluation mode.
        teacher_output: its features of the weak views.
        proposals: one ``Instances`` per image with ``proposal_boxes``, strong view.
        samples: the images; None for one that was mixed from several.

    Returns:
        The teacher's predictions for all proposals, in their order.

    Raises:
        UsageError: if an image was mixed. Its proposals are in no single weak view.
    """
    boxes = []
    for x, sample in zip(proposals, samples, strict=True):
        if sample is None:
            raise UsageError(
                "the method of SEMI.METHOD mixes images and also uses the teacher's predictions "
                "for the student's proposals, but a mixed image has no weak view to predict in; "
                "remove one of the two from the method"
            )
        boxes.append(project_boxes(x.proposal_boxes.tensor, sample.strong, sample.weak))
    return teacher.predict_rois(teacher_output, boxes)


def _unwrap(student: nn.Module) -> nn.Module:
    return student.module if isinstance(student, DistributedDataParallel) else student


@torch.no_grad()
def _metrics(
    teacher_output: TeacherOutput, pseudo_labels: list[Instances], proposals: SampledProposals
) -> dict[str, Tensor]:
    counts = torch.tensor([float(len(labels)) for labels in pseudo_labels])
    quality = cat([labels.gt_localization_quality for labels in pseudo_labels])
    scores = cat([detections.scores for detections in teacher_output.detections])
    return {
        "pseudo_labels/per_image": counts.mean(),
        "pseudo_labels/images_without": (counts == 0).float().mean(),
        # NaN if there are no pseudo-labels.
        "pseudo_labels/localization_quality": quality.mean(),
        HIGHEST_SCORE: scores.max() if len(scores) else counts.new_zeros(()),
        "proposals/foreground_per_image": proposals.is_foreground.sum() / len(proposals.instances),
        **proposals.metrics,
    }
