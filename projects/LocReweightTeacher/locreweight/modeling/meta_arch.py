"""Faster R-CNN as student and as teacher."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor
from torch.nn import functional as F

from ..installed_detectron2 import check_compiled_kernels, missing_kernels
from .output_layers import BoxPredictions

# Default of MODEL.ROI_HEADS.SCORE_THRESH_TEST. For pseudo-labels below it, that key and
# SEMI.PSEUDO_LABEL_THRESHOLD must both be lower.
_MAX_SCORE_THRESHOLD = 0.05


@dataclass(frozen=True)
class TeacherOutput:
    """Output of the teacher for the weak views of N images."""

    features: dict[str, Tensor]  # feature maps, for predictions at further boxes
    detections: list[Instances]  # after NMS; pred_boxes xyxy, absolute pixels, weak view


@dataclass(frozen=True)
class UnlabeledOutput:
    """Output of the student for the strong views of N images."""

    proposals: list[Instances]  # sampled, with gt_* of the matched pseudo-labels, strong view
    predictions: BoxPredictions  # for the proposals of all images, in their order
    rpn_losses: dict[str, Tensor]  # loss_rpn_cls, loss_rpn_loc, unweighted


class BackboneMixing(Protocol):
    """Mixes the unlabeled images before the backbone, and separates their features after it.

    Attributes:
        size_divisibility: the batch is padded to multiples of this height and width, in pixels.
    """

    size_divisibility: int

    def mix(self, images: Tensor) -> Tensor:
        """Mix ``(N, 3, H, W)`` normalized and padded images; returns the same shape."""

    def unmix(self, features: Tensor) -> Tensor:
        """Undo the mixing in ``(N, C, h, w)`` features of one level; returns the same shape."""


@META_ARCH_REGISTRY.register()
class SemiSupervisedRCNN(GeneralizedRCNN):
    """Detectron2's ``GeneralizedRCNN`` that can also be trained on unlabeled images.

    Without unlabeled images, and at inference, it is the same as ``GeneralizedRCNN``.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        check_compiled_kernels(cfg)
        try:
            return super().from_config(cfg)
        except ImportError as error:
            if "detectron2._C" not in str(error):
                raise
            # What Detectron2 raises when other code, such as a new backbone, uses such a kernel.
            raise missing_kernels(f"MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME}") from error

    def forward(
        self,
        batched_inputs: list[dict],
        unlabeled_inputs: list[dict] | None = None,
        mixing: BackboneMixing | None = None,
    ) -> list[dict] | dict[str, Tensor] | tuple[dict[str, Tensor], UnlabeledOutput]:
        """Run the backbone once on labeled and unlabeled images together, then both heads.

        Args:
            batched_inputs: labeled images in Detectron2's format: ``image`` (3, H, W) and
                ``instances`` with ``gt_boxes`` (xyxy, absolute pixels) and ``gt_classes``.
            unlabeled_inputs: strong views in the same format, whose ``instances`` are
                pseudo-labels. Their other ``gt_*`` fields are copied to the sampled proposals.
                The RPN is trained on ``rpn_instances`` if present, and its losses in an image are
                multiplied by ``loss_weight`` if present.
            mixing: mixes the unlabeled images around the backbone.

        Returns:
            Without unlabeled images, the output of ``GeneralizedRCNN``: losses in training,
            detections otherwise. With unlabeled images, the supervised losses and the output for
            the unlabeled images.
        """
        if not self.training or not unlabeled_inputs:
            return super().forward(batched_inputs)
        count = len(batched_inputs)
        images = self.preprocess_image([*batched_inputs, *unlabeled_inputs])
        # Copied first, because a copy waits until the device has finished its queued work.
        ground_truth = self._targets(batched_inputs)
        pseudo_labels = self._targets(unlabeled_inputs)
        rpn_labels = self._targets(unlabeled_inputs, "rpn_instances")
        tensor = images.tensor if mixing is None else _mix(images.tensor, count, mixing)
        labeled, unlabeled = _split_features(self.backbone(tensor), count)
        if mixing is not None:
            unlabeled = {name: mixing.unmix(x) for name, x in unlabeled.items()}
        weights = [x.get("loss_weight", 1.0) for x in unlabeled_inputs]

        losses = self._supervised_losses(
            _select_images(images, slice(None, count)), labeled, ground_truth
        )
        with get_event_storage().name_scope("unlabeled"):
            output = self._unlabeled_output(
                _select_images(images, slice(count, None)),
                unlabeled,
                rpn_labels,
                pseudo_labels,
                weights,
            )
        return losses, output

    def _supervised_losses(
        self, images: ImageList, features: dict[str, Tensor], targets: list[Instances]
    ) -> dict[str, Tensor]:
        proposals, rpn_losses = self.proposal_generator(images, features, targets)
        _, roi_losses = self.roi_heads(images, features, proposals, targets)
        return roi_losses | rpn_losses

    def _unlabeled_output(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        rpn_labels: list[Instances],
        pseudo_labels: list[Instances],
        weights: list[float],
    ) -> UnlabeledOutput:
        proposals, rpn_losses = self._weighted_proposals(images, features, rpn_labels, weights)
        sampled = self.roi_heads.label_and_sample_proposals(proposals, pseudo_labels)
        predictions = self.roi_heads.predict(features, [p.proposal_boxes for p in sampled])
        return UnlabeledOutput(sampled, predictions, rpn_losses)

    def _weighted_proposals(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        labels: list[Instances],
        weights: list[float],
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Run the RPN with a weight for the losses in each image.

        Detectron2 returns the mean over images, so each run of images with the same weight takes a
        call.
        """
        if set(weights) == {1.0}:
            return self.proposal_generator(images, features, labels)
        proposals: list[Instances] = []
        total: dict[str, Tensor] = {}
        for weight, group in groupby(weights):
            part = slice(len(proposals), len(proposals) + len(list(group)))
            found, losses = self.proposal_generator(
                _select_images(images, part),
                {name: x[part] for name, x in features.items()},
                labels[part],
            )
            proposals += found
            factor = weight * len(found) / len(weights)
            total = {name: factor * loss + total.get(name, 0.0) for name, loss in losses.items()}
        return proposals, total

    @torch.no_grad()
    def detect(self, batched_inputs: list[dict]) -> TeacherOutput:
        """Detect objects as the teacher, and keep the feature maps.

        Boxes are not averaged (``MODEL.ROI_BOX_HEAD.VOTING_SIGMA``): students that learned averaged
        boxes were not better (docs/results.md). ``MODEL.ROI_HEADS.SCORE_THRESH_TEST`` has no effect
        above 0.05, Detectron2's default, because pseudo-labels have other thresholds than results.

        Args:
            batched_inputs: weak views in Detectron2's format, with ``image`` (3, H, W).
        """
        assert not self.training, "detect() needs a model in eval mode"
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        proposals, _ = self.proposal_generator(images, features, None)
        predictions = self.roi_heads.predict(features, [x.proposal_boxes for x in proposals])
        detections, _ = self.roi_heads.box_predictor.inference(
            predictions, proposals, voting=False, max_score_threshold=_MAX_SCORE_THRESHOLD
        )
        return TeacherOutput(features, detections)

    @torch.no_grad()
    def predict_rois(self, teacher_output: TeacherOutput, boxes: list[Tensor]) -> BoxPredictions:
        """Predict for given boxes from the feature maps of :meth:`detect` (Sec. 3.4).

        Args:
            teacher_output: output of :meth:`detect` for N images.
            boxes: for each image ``(R_i, 4)`` xyxy, absolute pixels, **weak** view.

        Returns:
            Predictions for the boxes of all images, in their order.
        """
        return self.roi_heads.predict(teacher_output.features, [Boxes(b) for b in boxes])

    def _targets(self, batched_inputs: list[dict], key: str = "instances") -> list[Instances]:
        return [x.get(key, x["instances"]).to(self.device) for x in batched_inputs]


def _select_images(images: ImageList, part: slice) -> ImageList:
    return ImageList(images.tensor[part], images.image_sizes[part])


def _mix(images: Tensor, count: int, mixing: BackboneMixing) -> Tensor:
    """Pad a batch and mix its images, except the first ``count``, which are labeled."""
    height, width = images.shape[-2:]
    divisor = mixing.size_divisibility
    images = F.pad(images, (0, -width % divisor, 0, -height % divisor))
    return torch.cat([images[:count], mixing.mix(images[count:])])


def _split_features(
    features: dict[str, Tensor], count: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split feature maps into those of the first ``count`` images and those of the rest."""
    # Slicing twice would allocate a zero-filled gradient of the full batch for each slice.
    parts = {name: f.split([count, len(f) - count]) for name, f in features.items()}
    first, rest = ({name: part[i] for name, part in parts.items()} for i in range(2))
    return first, rest
