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
from .frozen_norm import fold_frozen_norms
from .parallel_roi_align import parallelize_roi_align
from .predictor import BoxPredictions


@dataclass(frozen=True)
class TeacherView:
    """What the teacher saw in the weak views of N images."""

    features: dict[str, Tensor]  # feature maps, kept for the second look at the student's proposals
    detections: list[Instances]  # after NMS; pred_boxes xyxy, absolute pixels of the weak view


@dataclass(frozen=True)
class UnlabeledOutput:
    """What the student says of the strong views of N unlabeled images, before any weighting."""

    proposals: list[Instances]  # sampled, with gt_* of their pseudo-labels; frame: strong view
    predictions: BoxPredictions  # of all those proposals, image after image
    rpn_losses: dict[str, Tensor]  # loss_rpn_cls, loss_rpn_loc


@META_ARCH_REGISTRY.register()
class SemiSupervisedRCNN(GeneralizedRCNN):
    """Detectron2's ``GeneralizedRCNN``, to which unlabeled images can be given in training.

    With labeled images alone, and at inference, it behaves as the class that it extends.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        check_compiled_kernels(cfg)
        try:
            parts = super().from_config(cfg)
        except ImportError as error:
            if "detectron2._C" not in str(error):
                raise
            # What Detectron2 raises when other code, such as a new backbone, uses such a kernel.
            raise missing_kernels(f"MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME}") from error
        parallelize_roi_align(parts["roi_heads"])
        if cfg.MODEL.FOLD_FROZEN_NORM:
            fold_frozen_norms(parts["backbone"])
        return parts

    def forward(
        self, batched_inputs: list[dict], unlabeled_inputs: list[dict] | None = None
    ) -> list[dict] | dict[str, Tensor] | tuple[dict[str, Tensor], UnlabeledOutput]:
        """One pass of the backbone over labeled and unlabeled images together.

        Args:
            batched_inputs: labeled images in Detectron2's format: ``image`` (3, H, W) and
                ``instances`` with ``gt_boxes`` (xyxy, absolute pixels) and ``gt_classes``.
            unlabeled_inputs: strong views in the same format, whose ``instances`` are
                pseudo-labels; every further ``gt_*`` field travels on to the sampled proposals.
                ``rpn_instances``, if given, are those that the proposal network learns from.

        Returns:
            Without unlabeled images what ``GeneralizedRCNN`` returns: the losses in training,
            detections otherwise. With them: the supervised losses and the unlabeled output.
        """
        if not self.training or not unlabeled_inputs:
            return super().forward(batched_inputs)
        count = len(batched_inputs)
        images = self.preprocess_image([*batched_inputs, *unlabeled_inputs])
        # Before the device is busy: copying them waits for what it was asked for.
        truth, pseudo_labels = self._targets(batched_inputs), self._targets(unlabeled_inputs)
        rpn_labels = self._targets(unlabeled_inputs, "rpn_instances")
        labeled, unlabeled = _split(self.backbone(images.tensor), count)

        losses = self._supervised_losses(_part_of(images, slice(None, count)), labeled, truth)
        with get_event_storage().name_scope("unlabeled"):
            output = self._unlabeled_output(
                _part_of(images, slice(count, None)), unlabeled, rpn_labels, pseudo_labels
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
    def look(self, batched_inputs: list[dict]) -> TeacherView:
        """The teacher's one backbone pass: detections, and the features that they came from."""
        assert not self.training, "the teacher looks in eval mode"
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        proposals, _ = self.proposal_generator(images, features, None)
        detections, _ = self.roi_heads(images, features, proposals, None)
        return TeacherView(features, detections)

    @torch.no_grad()
    def look_again(self, view: TeacherView, boxes: list[Tensor]) -> BoxPredictions:
        """The teacher's second look, at given boxes in views that it has seen (Sec. 3.4).

        Args:
            view: what :meth:`look` returned for N images.
            boxes: per image ``(R_i, 4)`` xyxy, absolute pixels of the **weak** view.

        Returns:
            predictions of all boxes, image after image.
        """
        return self.roi_heads.predict(view.features, [Boxes(b) for b in boxes])

    def _targets(self, batched_inputs: list[dict], key: str = "instances") -> list[Instances]:
        return [x.get(key, x["instances"]).to(self.device) for x in batched_inputs]


def _part_of(images: ImageList, part: slice) -> ImageList:
    return ImageList(images.tensor[part], images.image_sizes[part])


def _split(features: dict[str, Tensor], count: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Feature maps of the first ``count`` images, and those of the others."""
    # Not two slices: each would fill a gradient of all images with zeros.
    parts = {name: f.split([count, len(f) - count]) for name, f in features.items()}
    first, others = ({name: part[i] for name, part in parts.items()} for i in range(2))
    return first, others
