"""ISMT: two ROI heads that teach each other, and a memory of the detections in each image.

Yang et al., "Interactive Self-Training with Mean Teachers for Semi-supervised Object Detection"
(2021). **A reconstruction**: no code is public, and the constants (``SEMI.ISMT``) are unknown. Two
ROI heads with different initial weights share the backbone and the RPN. Each has an EMA teacher.
The teacher of one head labels for the other head. Its detections are united with those that it made
in the same image before, and fused by NMS; the result is stored and is the pseudo-label. DropBlock
in the students' ROI heads keeps the heads apart.

Assumed, because the paper's text was not available:

- Detections above ``SEMI.PSEUDO_LABEL_THRESHOLD`` are stored. NMS is per class and by score, and a
  stored detection keeps its score.
- DropBlock acts on the pooled features of labeled and unlabeled images.
- All losses are unweighted.
- Both heads have the same strong view. They are trained in the same step, each with its own pass
  through the shared backbone, so a step takes about twice the time of the baseline. The losses of
  both passes are added: those of the shared RPN count twice.
- The result is the detector with the first teacher head.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import batched_nms
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torchvision.ops import drop_block2d

from ..data.transforms.views import UnlabeledSample
from ..errors import UsageError
from ..geometry import warp_boxes
from ..losses.localization import at_least_float32
from ..modeling.meta_arch import SemiSupervisedRCNN
from .base import METHOD_REGISTRY, LabelingInputs, SemiSupervisedMethod

_UNLIMITED = 10**9  # pixels, the size of an image that boxes are not clipped to
# Fields of pseudo-labels that are stored, besides their boxes.
_FIELDS = ("gt_classes", "gt_score", "gt_localization_quality")


@METHOD_REGISTRY.register()
class ISMT(SemiSupervisedMethod):
    """Interactive self-training, a reconstruction.

    Attributes:
        memory: for each student, file name -> its pseudo-labels, on the CPU: ``boxes``, ``(N, 4)``
            xyxy in absolute pixels of the original image, and the fields of pseudo-labels.
    """

    num_members = 2

    @configurable
    def __init__(
        self, *, nms_iou: float, drop_block_share: float, drop_block_size: int, **kwargs: object
    ) -> None:
        """
        Args:
            nms_iou, drop_block_share, drop_block_size: ``SEMI.ISMT``.
            kwargs: arguments of :class:`SemiSupervisedMethod`.
        """
        super().__init__(**kwargs)
        self.nms_iou = nms_iou
        self.drop_block_share = drop_block_share
        self.drop_block_size = drop_block_size
        self.memory: list[dict[str, dict[str, Tensor]]] = [{} for _ in range(self.num_members)]

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        ismt = cfg.SEMI.ISMT
        side = cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION
        if not 0 <= ismt.DROP_BLOCK_SHARE < 1:
            raise UsageError(
                f"SEMI.ISMT.DROP_BLOCK_SHARE is {ismt.DROP_BLOCK_SHARE}; set a value in [0, 1)"
            )
        size = ismt.DROP_BLOCK_SIZE
        if not 1 <= size <= side or size % 2 == 0:
            raise UsageError(
                f"SEMI.ISMT.DROP_BLOCK_SIZE is {size}; set an odd number from 1 to {side}, which "
                "is MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION"
            )
        return super().from_config(cfg) | {
            "nms_iou": ismt.NMS_IOU,
            "drop_block_share": ismt.DROP_BLOCK_SHARE,
            "drop_block_size": size,
        }

    def prepare_members(self, members: list[SemiSupervisedRCNN]) -> None:
        """Share backbone and RPN, and add DropBlock to the ROI heads in training mode."""
        for member in members:
            member.backbone = members[0].backbone
            member.proposal_generator = members[0].proposal_generator
            member.roi_heads.box_head.register_forward_pre_hook(self._drop_blocks)

    def _drop_blocks(self, box_head: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        # float16 cannot represent the number of features that are kept, which scales the others.
        features = drop_block2d(
            at_least_float32(inputs[0]),
            self.drop_block_share,
            self.drop_block_size,
            training=box_head.training,
        )
        return features.to(inputs[0].dtype)

    def select_for_members(self, inputs: list[LabelingInputs]) -> list[list[Instances]]:
        """Select each student's pseudo-labels from the other teacher, fused with stored ones."""
        return [
            self.select_pseudo_labels(replace(inputs[1 - i], member=i)) for i in range(len(inputs))
        ]

    def select_pseudo_labels(self, inputs: LabelingInputs) -> list[Instances]:
        """Fuse the teacher's detections with the stored pseudo-labels of the student."""
        selected = super().select_pseudo_labels(inputs)
        return [
            self._with_stored(labels, sample, inputs.member)
            for labels, sample in zip(selected, inputs.samples, strict=True)
        ]

    def _with_stored(self, labels: Instances, sample: UnlabeledSample, student: int) -> Instances:
        stored = self.memory[student].get(sample.file_name)
        if stored is not None:
            device = labels.gt_boxes.device
            boxes = warp_boxes(stored["boxes"], sample.weak.matrix, labels.image_size)
            fields = {name: stored[name].to(device) for name in _FIELDS}
            old = Instances(labels.image_size, gt_boxes=Boxes(boxes.to(device)), **fields)
            labels = Instances.cat([labels, old])
        return fuse(labels, self.nms_iou)

    # The memory

    def observe(
        self, inputs: LabelingInputs, pseudo_labels: list[Instances]
    ) -> tuple[int, dict[str, dict[str, Tensor]]]:
        """Index of the student, and its pseudo-labels by file name."""
        return inputs.member, {
            sample.file_name: to_original(labels, sample)
            for sample, labels in zip(inputs.samples, pseudo_labels, strict=True)
        }

    def update_state(self, observations: list[tuple[int, dict[str, dict[str, Tensor]]]]) -> None:
        for student, entries in observations:
            self.memory[student].update(entries)

    def state_dict(self) -> dict:
        return {"memory": [pack(entries) for entries in self.memory]}

    def load_state_dict(self, state_dict: dict) -> None:
        self.memory = [unpack(packed) for packed in state_dict["memory"]]


def fuse(labels: Instances, iou: float) -> Instances:
    """Remove pseudo-labels that overlap one of the same class with a higher score (NMS).

    Args:
        labels: with ``gt_boxes``, ``gt_classes`` and ``gt_score``.
        iou: boxes that overlap more than this are the same object.

    Returns:
        The others, by descending score.
    """
    kept = batched_nms(labels.gt_boxes.tensor, labels.gt_score, labels.gt_classes, iou)
    return labels[kept]


def to_original(labels: Instances, sample: UnlabeledSample) -> dict[str, Tensor]:
    """Return pseudo-labels of the weak view in the frame of the original image, on the CPU."""
    matrix = torch.linalg.inv(sample.weak.matrix)
    boxes = warp_boxes(labels.gt_boxes.tensor.cpu(), matrix, (_UNLIMITED, _UNLIMITED))
    return {"boxes": boxes} | {name: labels.get(name).cpu() for name in _FIELDS}


def pack(entries: dict[str, dict[str, Tensor]]) -> dict:
    """Join the pseudo-labels of all files for a checkpoint.

    A checkpoint of a hundred thousand small tensors takes minutes to write and to read.
    """
    if not entries:
        return {}
    joined = {
        name: torch.cat([entry[name] for entry in entries.values()]) for name in ("boxes", *_FIELDS)
    }
    counts = [len(entry["boxes"]) for entry in entries.values()]
    return {"file_names": list(entries), "counts": counts} | joined


def unpack(packed: dict) -> dict[str, dict[str, Tensor]]:
    """Return the pseudo-labels by file name; the inverse of :func:`pack`."""
    if not packed:
        return {}
    columns = ("boxes", *_FIELDS)
    parts = zip(*(packed[name].split(packed["counts"]) for name in columns), strict=True)
    return {
        file_name: dict(zip(columns, values, strict=True))
        for file_name, values in zip(packed["file_names"], parts, strict=True)
    }
