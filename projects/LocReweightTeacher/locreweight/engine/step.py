"""One training step on labeled and unlabeled images, from views to losses (Fig. 2).

Frames: pseudo-labels are found in the *weak* view and carried to the *strong* one, where the
student learns; the student's proposals are carried back, for the teacher to judge them.
All boxes are xyxy in absolute pixels of the view that is named.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.layers import cat
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..data.streams import Batch
from ..data.views import UnlabeledSample, View
from ..method.geometry import between_views, warp_boxes
from ..modeling.detector import SemiSupervisedRCNN, TeacherView, UnlabeledOutput

UNLABELED_SUFFIX = "_unlabeled"
HIGHEST_SCORE = "pseudo_labels/highest_score"


@dataclass(frozen=True)
class StepSettings:
    """What the step takes from the config.

    Attributes:
        threshold: a detection above this score is a pseudo-label.
        ler, prc: whether Eq. 11 and Eq. 14 weight the unsupervised losses.
        loss_weights: name of a loss on unlabeled images -> its factor in the total (Eq. 3); losses
            on labeled images are not in it: they count as they are.
    """

    threshold: float
    ler: bool
    prc: bool
    loss_weights: dict[str, float]

    @classmethod
    def from_config(cls, cfg: CfgNode) -> StepSettings:
        semi = cfg.SEMI
        beta = semi.UNSUPERVISED_WEIGHT
        weights = {
            "loss_cls": beta,
            "loss_box_reg": beta,
            "loss_rpn_cls": beta * semi.RPN_OBJECTNESS_LOSS,
            "loss_rpn_loc": beta * semi.RPN_BOX_LOSS,
        }
        return cls(
            threshold=semi.PSEUDO_LABEL_THRESHOLD,
            ler=semi.LER,
            prc=semi.PRC,
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
        teacher: in evaluation mode.
        batch: of this process.
        settings: from the config.
    """
    if not batch.unlabeled:
        return StepResult(student(batch.labeled), {})

    seen = teacher.look([{"image": sample.weak.image} for sample in batch.unlabeled])
    pseudo_labels = [
        to_strong_view(select_pseudo_labels(found, settings.threshold), sample)
        for found, sample in zip(seen.detections, batch.unlabeled, strict=True)
    ]
    strong_views = [
        {"image": sample.strong.image, "instances": labels}
        for sample, labels in zip(batch.unlabeled, pseudo_labels, strict=True)
    ]
    losses, output = student(batch.labeled, strong_views)

    labels = cat([p.gt_classes for p in output.proposals])
    reliability = second_look(teacher, seen, output, batch.unlabeled, labels)
    detector = student.module if isinstance(student, DistributedDataParallel) else student
    assert isinstance(detector, SemiSupervisedRCNN)
    roi_heads = detector.roi_heads
    unlabeled_losses = output.rpn_losses | roi_heads.box_predictor.unsupervised_losses(
        output.predictions,
        output.proposals,
        quality=matched_quality(output.proposals, labels) if settings.ler else None,
        reliability=reliability if settings.prc else None,
    )
    for name, loss in unlabeled_losses.items():
        weight = settings.loss_weights[name + UNLABELED_SUFFIX]
        losses[name + UNLABELED_SUFFIX] = weight * loss
    foreground = labels < roi_heads.num_classes
    return StepResult(losses, _metrics(seen, pseudo_labels, reliability, foreground))


def select_pseudo_labels(detections: Instances, threshold: float) -> Instances:
    """The detections above the score threshold, as ground truth for the student.

    Args:
        detections: of one image, after NMS.
        threshold: on the class probability.

    Returns:
        ``gt_boxes`` (frame of the detections), ``gt_classes``, ``gt_localization_quality``.
    """
    chosen = detections[detections.scores > threshold]
    return Instances(
        detections.image_size,
        gt_boxes=chosen.pred_boxes,
        gt_classes=chosen.pred_classes,
        gt_localization_quality=chosen.localization_quality,
    )


def to_strong_view(labels: Instances, sample: UnlabeledSample) -> Instances:
    """Pseudo-labels carried from the weak view to the strong one, without those out of sight."""
    boxes = _carry(labels.gt_boxes.tensor, sample.weak, sample.strong)
    carried = Instances(sample.strong.image_size, **labels.get_fields())
    carried.gt_boxes = Boxes(boxes)
    return carried[carried.gt_boxes.nonempty(threshold=1.0)]


def second_look(
    teacher: SemiSupervisedRCNN,
    seen: TeacherView,
    output: UnlabeledOutput,
    samples: list[UnlabeledSample],
    labels: Tensor,
) -> Tensor:
    """``(R,)`` the teacher's view of how reliable the student's proposals are (Eq. 12 and 13)."""
    boxes = [
        _carry(proposals.proposal_boxes.tensor, sample.strong, sample.weak)
        for proposals, sample in zip(output.proposals, samples, strict=True)
    ]
    return teacher.reliability_of(seen, boxes, labels)


def matched_quality(proposals: list[Instances], labels: Tensor) -> Tensor:
    """``(R,)`` localization quality of each proposal's pseudo-label; zero where there is none."""
    parts = []
    for p in proposals:
        # An image without pseudo-labels gives its proposals no gt_ field but their class.
        known = p.has("gt_localization_quality")
        parts.append(p.gt_localization_quality if known else torch.zeros(len(p)).to(labels.device))
    return cat(parts)


def _carry(boxes: Tensor, source: View, target: View) -> Tensor:
    return warp_boxes(boxes, between_views(source.matrix, target.matrix), target.image_size)


@torch.no_grad()
def _metrics(
    seen: TeacherView, pseudo_labels: list[Instances], reliability: Tensor, foreground: Tensor
) -> dict[str, Tensor]:
    def mean_where(values: Tensor, chosen: Tensor) -> Tensor:
        return (values * chosen).sum() / chosen.sum()  # NaN for none: it is not zero, but unknown

    counts = torch.tensor([float(len(labels)) for labels in pseudo_labels])
    quality = cat([labels.gt_localization_quality for labels in pseudo_labels])
    scores = cat([found.scores for found in seen.detections])
    return {
        "pseudo_labels/per_image": counts.mean(),
        "pseudo_labels/images_without": (counts == 0).float().mean(),
        "pseudo_labels/localization_quality": quality.mean(),
        HIGHEST_SCORE: scores.max() if len(scores) else counts.new_zeros(()),
        "proposals/reliability_foreground": mean_where(reliability, foreground),
        "proposals/reliability_background": mean_where(reliability, ~foreground),
        "proposals/foreground_per_image": foreground.sum() / len(pseudo_labels),
    }
