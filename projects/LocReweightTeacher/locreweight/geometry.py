"""Projection of boxes between augmented views of an image (alignment, Sec. 3.4).

An affine transform maps the original image to a view. It is a ``(3, 3)`` matrix that acts on column
vectors ``(x, y, 1)`` of continuous pixel coordinates, in which the first pixel covers ``[0, 1]``.
All boxes are xyxy in absolute pixels of the view that is named.
"""

from __future__ import annotations

import torch
from torch import Tensor


def between_views(source: Tensor, target: Tensor) -> Tensor:
    """Compute the matrix that maps the source view to the target view.

    Args:
        source, target: ``(3, 3)`` matrices, original image -> view.

    Returns:
        ``(3, 3)`` matrix, source view -> target view: ``target @ inverse(source)``.

    Raises:
        ValueError: if the source matrix is singular, so the view has no area.
    """
    # Autocast would compute the product in half precision.
    with torch.autocast(source.device.type, enabled=False):
        try:
            return target @ torch.linalg.inv(source)
        except torch.linalg.LinAlgError as error:
            raise ValueError(
                f"the matrix of the source view cannot be inverted: {source.tolist()}"
            ) from error


def warp_boxes(boxes: Tensor, matrix: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Map boxes by an affine transform, and clip their axis-aligned hulls to the target view.

    Args:
        boxes: ``(N, 4)`` xyxy, absolute pixels of the source view.
        matrix: ``(3, 3)`` affine, source view -> target view.
        image_size: ``(height, width)`` of the target view in pixels.

    Returns:
        ``(N, 4)`` xyxy, absolute pixels of the target view. For flips, scales and translations the
        hull is the mapped box itself. For rotations and shears it contains the mapped box. A box
        outside of the view becomes a box without area on the view's border.
    """
    # Half precision is too coarse for pixel coordinates; integers are too coarse for the matrix.
    dtype = torch.promote_types(boxes.dtype, torch.float32)
    # The copy is asynchronous. A list as index would be copied too, and the host would wait for it.
    boxes, matrix = boxes.to(dtype), matrix.to(boxes.device, dtype, non_blocking=True)
    left, top, right, bottom = boxes.unbind(dim=1)
    x = torch.stack([left, right, left, right], dim=1)
    y = torch.stack([top, top, bottom, bottom], dim=1)
    # Not a matrix product, which autocast would compute in half precision.
    mapped_x = matrix[0, 0] * x + matrix[0, 1] * y + matrix[0, 2]
    mapped_y = matrix[1, 0] * x + matrix[1, 1] * y + matrix[1, 2]
    height, width = image_size
    x1, x2 = mapped_x.clamp(0, width).aminmax(dim=1)
    y1, y2 = mapped_y.clamp(0, height).aminmax(dim=1)
    return torch.stack([x1, y1, x2, y2], dim=1)
