"""How much memory training with a config will need, measured on a small image and scaled up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

import locreweight.modeling  # noqa: F401  (registers the model)

from ..data.transforms.policies import build_augmentation_policy
from ..methods import build_method

GIB = 2**30
_DIVISIBILITY = 32  # images are padded to multiples of it
_LARGEST_MEASURED = 512  # pixels, side of the larger image that is measured
# Peak of a training over what is counted here: 1.54 for the quickstart and 1.63 for bccd-small, on
# CPU. What operations need in passing and what the allocator loses is not counted.
_PEAK_OVER_COUNTED = 1.6


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device.

    Attributes:
        models: weights of student and teacher, gradients and momentum.
        per_image: what the backward pass needs of one image of the largest size.
        images: that the student sees in an iteration.
    """

    models: int
    per_image: int
    images: int

    @property
    def peak(self) -> float:
        """What a training may need, as experience has it; without CUDA's own half to one GiB."""
        return _PEAK_OVER_COUNTED * (self.models + self.per_image * self.images)


def estimate_memory(cfg: CfgNode, sizes: list[tuple[int, int]], num_gpus: int) -> MemoryEstimate:
    """Memory of a training step.

    What autograd keeps of one image is counted for two small sizes, and continued linearly to the
    largest that the data and the config make.

    Args:
        cfg: scaled to the number of GPUs.
        sizes: ``(width, height)`` of the images.
        num_gpus: processes.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    model = build_model(cfg).train()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    teachers = 2 if build_method(cfg).frozen_pseudo_labeler else 1
    # Gradient and momentum; several processes hold what they exchange a second time.
    models = weights * (1 + teachers) + trained * (3 if num_gpus > 1 else 2)

    largest = max(_pixels(size, cfg) for size in sizes)
    side = min(_LARGEST_MEASURED, _padded(int(largest**0.5)))
    small, large = (_kept_bytes(model, s, cfg.SOLVER.AMP.ENABLED) for s in (side // 2, side))
    per_pixel = (large - small) / (side**2 - (side // 2) ** 2)
    per_image = large + per_pixel * (largest - side**2)

    views = len(build_augmentation_policy(cfg).labeled)
    images = cfg.SOLVER.IMS_PER_BATCH * views + cfg.SOLVER.IMS_PER_BATCH_UNLABELED
    if cfg.SEMI.BURN_IN_ITERS >= cfg.SOLVER.MAX_ITER:
        images = cfg.SOLVER.IMS_PER_BATCH * views
    return MemoryEstimate(models, round(per_image), images // num_gpus)


def _pixels(size: tuple[int, int], cfg: CfgNode) -> int:
    width, height = size
    shortest = max(cfg.INPUT.MIN_SIZE_TRAIN)
    if shortest:
        limit = cfg.INPUT.MAX_SIZE_TRAIN
        height, width = ResizeShortestEdge.get_output_shape(height, width, shortest, limit)
    return _padded(width) * _padded(height)


def _padded(side: int) -> int:
    return -(-side // _DIVISIBILITY) * _DIVISIBILITY


def _kept_bytes(model: nn.Module, side: int, autocast: bool) -> int:
    """What autograd keeps of one labeled image for the backward pass, weights aside."""
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    box = torch.tensor([[0.2, 0.2, 0.8, 0.8]]) * side
    truth = Instances((side, side), gt_boxes=Boxes(box), gt_classes=torch.zeros(1).long())
    image = torch.randint(0, 256, (3, side, side), dtype=torch.uint8)
    with (
        EventStorage(),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
    ):
        # Two, since batch norm refuses single values.
        losses = model([{"image": image, "instances": truth}] * 2)
        total = sum(losses.values())  # holds what is counted until all of it is
    assert isinstance(total, Tensor)
    return sum(kept.values()) // 2
