"""Functions of methods that mix the pixels and the labels of several images.

Boxes are xyxy in absolute pixels of the image that is named.
"""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from torch import Tensor

from .base import StudentImage


def pixel_mean(cfg: CfgNode) -> Tensor:
    """Return the ``(3,)`` color that normalization maps to zero, the value of padding."""
    return torch.tensor(cfg.MODEL.PIXEL_MEAN, dtype=torch.float32)


def blank(size: tuple[int, int], fill: Tensor, device: torch.device) -> Tensor:
    """Return a ``(3, H, W)`` float32 image of a ``(3,)`` color; the size is ``(H, W)``."""
    return fill.to(device, non_blocking=True)[:, None, None].repeat(1, *size)


def place(image: Tensor, size: tuple[int, int], corner: tuple[int, int], fill: Tensor) -> Tensor:
    """Place an image on a canvas.

    Args:
        image: ``(3, h, w)``.
        size: ``(H, W)`` of the canvas in pixels.
        corner: ``(x, y)`` of the image's upper left corner on the canvas.
        fill: ``(3,)`` color of the canvas.

    Returns:
        ``(3, H, W)`` float32.
    """
    x, y = corner
    height, width = image.shape[1:]
    canvas = blank(size, fill, image.device)
    canvas[:, y : y + height, x : x + width] = image
    return canvas


def place_labels(labels: Instances, size: tuple[int, int], corner: tuple[int, int]) -> Instances:
    """Return the labels of an image that is placed on a canvas.

    Args:
        labels: ground truth or pseudo-labels.
        size, corner: as in :func:`place`.

    Returns:
        ``Instances`` of the canvas with the same fields.
    """
    x, y = corner
    boxes = labels.gt_boxes.tensor.clone()
    boxes[:, 0::2] += x
    boxes[:, 1::2] += y
    return Instances(size, **(labels.get_fields() | {"gt_boxes": Boxes(boxes)}))


def select_fields(labels: Instances, *names: str) -> Instances:
    """Return labels with ``gt_boxes``, ``gt_classes`` and the named fields only.

    Labels are united if they have the same fields. Ground truth has no further ones.
    """
    kept = ("gt_boxes", "gt_classes", *names)
    return Instances(labels.image_size, **{name: labels.get(name) for name in kept})


def labeled_image(labeled: dict, device: torch.device) -> StudentImage:
    """Convert a labeled image in Detectron2's format."""
    return StudentImage(labeled["image"].to(device), labeled["instances"].to(device), sample=None)


def common_size(*images: Tensor) -> tuple[int, int]:
    """Return the largest height and the largest width of ``(3, H, W)`` images."""
    return max(x.shape[1] for x in images), max(x.shape[2] for x in images)
