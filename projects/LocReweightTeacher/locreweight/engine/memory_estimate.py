"""Estimate of the memory that training needs, measured on small images and extrapolated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

import locreweight.modeling  # noqa: F401  (registers the model)

from ..data.transforms.policies import build_augmentation_policy
from ..methods import build_members, build_method
from ..modeling.committee import members_of

GIB = 2**30
_DIVISIBILITY = 32  # images are padded to multiples of this
_LARGEST_MEASURED = 512  # pixels, side of the larger of the two measured images
# Peak memory of a training run divided by the counted memory: 1.54 for the quickstart and 1.63 for
# bccd-small, on CPU. Temporary buffers and losses of the allocator are not counted.
_PEAK_OVER_COUNTED = 1.6


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory on one device.

    Attributes:
        models: bytes of the weights of students and teachers, gradients and the optimizer's state.
        per_image: bytes that autograd keeps for one image of the largest size.
        images: number of images of all students per iteration.
    """

    models: int
    per_image: int
    images: int

    @property
    def peak(self) -> float:
        """Expected peak in bytes, without the 0.5 to 1 GiB that CUDA itself takes."""
        return _PEAK_OVER_COUNTED * (self.models + self.per_image * self.images)


def estimate_memory(cfg: CfgNode, sizes: list[tuple[int, int]], num_gpus: int) -> MemoryEstimate:
    """Estimate the memory of a training step.

    The memory that autograd keeps for one image is measured at two small sizes and extrapolated
    linearly to the largest size that the images have after resizing.

    Args:
        cfg: scaled to the number of GPUs.
        sizes: ``(width, height)`` of the images, before resizing.
        num_gpus: number of processes.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    method = build_method(cfg)
    students = build_members(cfg, method).train()
    weights = sum(p.numel() * p.element_size() for p in students.parameters())
    trained = sum(p.numel() * p.element_size() for p in students.parameters() if p.requires_grad)
    teachers = 2 if method.frozen_pseudo_labeler else 1
    # With several processes, DDP keeps a second copy of the gradients.
    gradients = 2 if num_gpus > 1 else 1
    moments = 2 if cfg.SOLVER.OPTIMIZER == "AdamW" else 1
    models = weights * (1 + teachers) + trained * (gradients + moments)

    largest = max(_pixels(size, cfg) for size in sizes)
    side = min(_LARGEST_MEASURED, _padded(int(largest**0.5)))
    small, large = (
        _kept_bytes(members_of(students)[0], s, cfg.SOLVER.AMP.ENABLED) for s in (side // 2, side)
    )
    per_pixel = (large - small) / (side**2 - (side // 2) ** 2)
    per_image = large + per_pixel * (largest - side**2)

    views = len(build_augmentation_policy(cfg).labeled)
    images = cfg.SOLVER.IMS_PER_BATCH * views // num_gpus
    if cfg.SEMI.BURN_IN_ITERS < cfg.SOLVER.MAX_ITER:
        images += cfg.SOLVER.IMS_PER_BATCH_UNLABELED // num_gpus + method.further_images
    return MemoryEstimate(models, round(per_image), images * method.num_members)


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
    """Bytes that autograd keeps for the backward pass of one labeled image, without weights."""
    weights = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    box = torch.tensor([[0.2, 0.2, 0.8, 0.8]]) * side
    ground_truth = Instances((side, side), gt_boxes=Boxes(box), gt_classes=torch.zeros(1).long())
    image = torch.randint(0, 256, (3, side, side), dtype=torch.uint8)
    with (
        EventStorage(),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
    ):
        # Two images, because batch norm rejects single values.
        losses = model([{"image": image, "instances": ground_truth}] * 2)
        total = sum(losses.values())  # keeps the graph, and so the counted tensors, alive
    assert isinstance(total, Tensor)
    return sum(kept.values()) // 2
