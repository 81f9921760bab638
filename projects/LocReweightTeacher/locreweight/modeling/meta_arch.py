"""Faster R-CNN as student and as teacher."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor

from ..installed_detectron2 import check_compiled_kernels, missing_kernels
from .output_layers import BoxPredictions


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
        self, batched_inputs: list[dict], unlabeled_inputs: list[dict] | None = None
    ) -> list[dict] | dict[str, Tensor] | tuple[dict[str, Tensor], UnlabeledOutput]:
        """Run the backbone once on labeled and unlabeled images together, then both heads.

        Args:
            batched_inputs: labeled images in Detectron2's format: ``image`` (3, H, W) and
                ``instances`` with ``gt_boxes`` (xyxy, absolute pixels) and ``gt_classes``.
            unlabeled_inputs: strong views in the same format, whose ``instances`` are
                pseudo-labels. Their other ``gt_*`` fields are copied to the sampled proposals.
                The RPN is trained on ``rpn_instances`` if present.

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
        labeled, unlabeled = _split_features(self.backbone(images.tensor), count)

        losses = self._supervised_losses(
            _select_images(images, slice(None, count)), labeled, ground_truth
        )
        with get_event_storage().name_scope("unlabeled"):
            output = self._unlabeled_output(
                _select_images(images, slice(count, None)), unlabeled, rpn_labels, pseudo_labels
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
    ) -> UnlabeledOutput:
        proposals, rpn_losses = self.proposal_generator(images, features, rpn_labels)
        sampled = self.roi_heads.label_and_sample_proposals(proposals, pseudo_labels)
        predictions = self.roi_heads.predict(features, [p.proposal_boxes for p in sampled])
        return UnlabeledOutput(sampled, predictions, rpn_losses)

    @torch.no_grad()
    def detect(self, batched_inputs: list[dict]) -> TeacherOutput:
        """Detect objects as the teacher, and keep the feature maps.

        Args:
            batched_inputs: weak views in Detectron2's format, with ``image`` (3, H, W).
        """
        assert not self.training, "detect() needs a model in eval mode"
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        proposals, _ = self.proposal_generator(images, features, None)
        detections, _ = self.roi_heads(images, features, proposals, None)
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


def _split_features(
    features: dict[str, Tensor], count: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split feature maps into those of the first ``count`` images and those of the rest."""
    # Slicing twice would allocate a zero-filled gradient of the full batch for each slice.
    parts = {name: f.split([count, len(f) - count]) for name, f in features.items()}
    first, rest = ({name: part[i] for name, part in parts.items()} for i in range(2))
    return first, rest
