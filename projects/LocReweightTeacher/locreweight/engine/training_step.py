"""One training step on labeled and unlabeled images, from views to losses (Fig. 2).

Frames: pseudo-labels are found in the *weak* view and carried to the *strong* one, where the
student learns; the student's proposals are carried back, for the teacher to judge them.
All boxes are xyxy in absolute pixels of the view that is named.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from detectron2.config import CfgNode
from detectron2.layers import cat
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..data.loader import Batch
from ..data.transforms.views import UnlabeledSample, View
from ..geometry import between_views, warp_boxes
from ..methods import SampledProposals, SemiSupervisedMethod, build_method
from ..modeling.meta_arch import SemiSupervisedRCNN, TeacherOutput, UnlabeledOutput
from ..modeling.output_layers import BoxPredictions

UNLABELED_SUFFIX = "_unlabeled"
HIGHEST_SCORE = "pseudo_labels/highest_score"


@dataclass(frozen=True)
class StepSettings:
    """What the step takes from the config.

    Attributes:
        strategy: the method: which pseudo-labels, and how they are learned from.
        loss_weights: name of a loss on unlabeled images -> its factor in the total (Eq. 3); losses
            on labeled images are not in it: they count as they are.
    """

    strategy: SemiSupervisedMethod
    loss_weights: dict[str, float]

    @classmethod
    def from_config(cls, cfg: CfgNode) -> StepSettings:
        semi = cfg.SEMI
        beta = semi.UNSUPERVISED_WEIGHT
        weights = {
            "loss_cls": beta,
            "loss_box_reg": beta * cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT,
            "loss_rpn_cls": beta * semi.RPN_OBJECTNESS_LOSS,
            "loss_rpn_loc": beta * semi.RPN_BOX_LOSS,
        }
        return cls(
            strategy=build_method(cfg),
            loss_weights={name + UNLABELED_SUFFIX: weight for name, weight in weights.items()},
        )


@dataclass(frozen=True)
class StepResult:
    """What a step gives.

    Attributes:
        losses: scalars by name, weighted; their sum is what is minimized.
        metrics: scalars to be logged, by name; NaN where there was nothing to measure.
    """

    losses: dict[str, Tensor]
    metrics: dict[str, Tensor]

    @property
    def total(self) -> Tensor:
        """``L = L_s + beta * L_u`` (Eq. 3)."""
        return torch.stack(list(self.losses.values())).sum()


def training_step(
    student: nn.Module, teacher: SemiSupervisedRCNN, batch: Batch, settings: StepSettings
) -> StepResult:
    """Losses of a batch: supervised alone if it has no unlabeled images, else Eq. 3.

    Args:
        student: a :class:`SemiSupervisedRCNN` in training mode, or one wrapped for several GPUs.
        teacher: the one that labels, in evaluation mode.
        batch: of this process.
        settings: from the config.
    """
    if not batch.unlabeled:
        return StepResult(student(batch.labeled), {})
    strategy, samples = settings.strategy, batch.unlabeled

    seen = teacher.detect([{"image": sample.weak.image} for sample in samples])
    chosen = strategy.choose_pseudo_labels(teacher, seen)
    pseudo_labels = [project_to_strong_view(*pair) for pair in zip(chosen, samples, strict=True)]
    losses, output = student(batch.labeled, _strong_views(samples, pseudo_labels, strategy))

    detector = student.module if isinstance(student, DistributedDataParallel) else student
    assert isinstance(detector, SemiSupervisedRCNN)
    sampled = SampledProposals(
        output.proposals,
        output.predictions,
        detector.roi_heads.box_predictor,
        predict_rois=partial(predict_student_rois, teacher, seen, output, samples),
    )
    for name, loss in (output.rpn_losses | strategy.losses(sampled)).items():
        weight = settings.loss_weights[name + UNLABELED_SUFFIX]
        losses[name + UNLABELED_SUFFIX] = weight * loss
    return StepResult(losses, _metrics(seen, pseudo_labels, sampled))


def _strong_views(
    samples: list[UnlabeledSample], pseudo_labels: list[Instances], strategy: SemiSupervisedMethod
) -> list[dict]:
    """What the student is given of each unlabeled image."""
    return [
        {
            "image": sample.strong.image,
            "instances": labels,
            "rpn_instances": strategy.for_rpn(labels) if strategy.for_rpn else labels,
        }
        for sample, labels in zip(samples, pseudo_labels, strict=True)
    ]


def project_to_strong_view(labels: Instances, sample: UnlabeledSample) -> Instances:
    """Pseudo-labels carried from the weak view to the strong one, without those out of sight."""
    boxes = project_boxes(labels.gt_boxes.tensor, sample.weak, sample.strong)
    carried = Instances(sample.strong.image_size, **labels.get_fields())
    carried.gt_boxes = Boxes(boxes)
    return carried[carried.gt_boxes.nonempty(threshold=1.0).nonzero().squeeze(1)]


def predict_student_rois(
    teacher: SemiSupervisedRCNN,
    seen: TeacherOutput,
    output: UnlabeledOutput,
    samples: list[UnlabeledSample],
) -> BoxPredictions:
    """The teacher's predictions at the student's proposals, carried to where it saw them."""
    boxes = [
        project_boxes(proposals.proposal_boxes.tensor, sample.strong, sample.weak)
        for proposals, sample in zip(output.proposals, samples, strict=True)
    ]
    return teacher.predict_rois(seen, boxes)


def project_boxes(boxes: Tensor, source: View, target: View) -> Tensor:
    return warp_boxes(boxes, between_views(source.matrix, target.matrix), target.image_size)


@torch.no_grad()
def _metrics(
    seen: TeacherOutput, pseudo_labels: list[Instances], sampled: SampledProposals
) -> dict[str, Tensor]:
    counts = torch.tensor([float(len(labels)) for labels in pseudo_labels])
    quality = cat([labels.gt_localization_quality for labels in pseudo_labels])
    scores = cat([found.scores for found in seen.detections])
    return {
        "pseudo_labels/per_image": counts.mean(),
        "pseudo_labels/images_without": (counts == 0).float().mean(),
        # NaN for none: it is not zero, but unknown.
        "pseudo_labels/localization_quality": quality.mean(),
        HIGHEST_SCORE: scores.max() if len(scores) else counts.new_zeros(()),
        "proposals/foreground_per_image": sampled.is_foreground.sum() / len(pseudo_labels),
        **sampled.metrics,
    }
