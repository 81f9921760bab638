"""One training step, from a batch of views to the losses (Fig. 2).

The teacher detects objects in the *weak* view of each unlabeled image. The method selects
pseudo-labels from these detections, which are projected to the *strong* view. The student is
trained on the labeled images and on the strong views. Some losses need the teacher's predictions
for the student's proposals; for these, the proposals are projected back to the weak view.

All boxes are xyxy in absolute pixels of the view that is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
from ..modeling.meta_arch import SemiSupervisedRCNN, TeacherOutput
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
        observation: what the method's state learns from this step; None without such a state.
    """

    losses: dict[str, Tensor]
    metrics: dict[str, Tensor]
    observation: object = None

    @property
    def total(self) -> Tensor:
        """``L = L_s + beta * L_u`` (Eq. 3)."""
        return torch.stack(list(self.losses.values())).sum()


def training_step(
    student: nn.Module, teacher: SemiSupervisedRCNN, batch: Batch, settings: StepSettings
) -> StepResult:
    """Compute the losses of a batch (Eq. 3), or the supervised ones alone during burn-in.

    Args:
        student: a :class:`SemiSupervisedRCNN` in training mode, possibly wrapped in
            ``DistributedDataParallel``.
        teacher: the model that makes the pseudo-labels, in evaluation mode.
        batch: the images of this process; without unlabeled images during burn-in.
        settings: from the config.
    """
    if not batch.unlabeled:
        return StepResult(student(batch.labeled), {})
    method, samples = settings.method, batch.unlabeled

    # Teacher: weak views -> pseudo-labels, in the frame of the strong views.
    teacher_output = teacher.detect([{"image": sample.weak.image} for sample in samples])
    inputs = LabelingInputs(teacher, teacher_output, samples)
    selected = method.select_pseudo_labels(inputs)
    observation = method.observe(inputs, selected)
    pseudo_labels = [
        project_to_strong_view(labels, sample)
        for labels, sample in zip(selected, samples, strict=True)
    ]

    # Student: labeled images and strong views -> supervised losses, sampled proposals.
    images = method.compose(
        [
            StudentImage(sample.strong.image, labels, sample)
            for sample, labels in zip(samples, pseudo_labels, strict=True)
        ],
        batch.labeled,
    )
    unlabeled = [
        {
            "image": x.image,
            "instances": x.pseudo_labels,
            "rpn_instances": method.rpn_labels(x.pseudo_labels),
            "loss_weight": x.loss_weight,
        }
        for x in images
    ]
    losses, output = student(
        batch.labeled, unlabeled, mixing=method.backbone_mixing(len(unlabeled))
    )

    # Method: sampled proposals -> unsupervised losses.
    proposals = SampledProposals(
        output.proposals,
        output.predictions,
        _unwrap(student).roi_heads.box_predictor,
        predict_rois=lambda: predict_student_rois(
            teacher, teacher_output, output.proposals, [x.sample for x in images]
        ),
        loss_weights=[x.loss_weight for x in images],
    )
    for name, loss in (output.rpn_losses | method.losses(proposals)).items():
        losses[name + UNLABELED_SUFFIX] = settings.weight_of(name) * loss
    return StepResult(losses, _metrics(teacher_output, pseudo_labels, proposals), observation)


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


def _unwrap(student: nn.Module) -> SemiSupervisedRCNN:
    model = student.module if isinstance(student, DistributedDataParallel) else student
    assert isinstance(model, SemiSupervisedRCNN)
    return model


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
