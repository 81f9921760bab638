"""A view: an augmented image that knows how it was made from the original one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from detectron2.data import transforms as T
from torch import Tensor


@dataclass(frozen=True)
class View:
    """One augmented view of an image.

    Attributes:
        image: ``(3, H, W)`` uint8, channels in the order of ``INPUT.FORMAT``.
        matrix: ``(3, 3)`` float64, original pixel coordinates -> those of this view.
    """

    image: Tensor
    matrix: Tensor

    @property
    def image_size(self) -> tuple[int, int]:
        """``(height, width)`` in pixels."""
        return self.image.shape[1], self.image.shape[2]


@dataclass(frozen=True)
class UnlabeledSample:
    """The two views of one unlabeled image.

    Attributes:
        read_errors: one message for each image that was drawn first but could not be read.
    """

    file_name: str
    weak: View
    strong: View
    read_errors: tuple[str, ...] = ()


def matrix_of(transforms: T.TransformList, image_size: tuple[int, int]) -> Tensor:
    """The affine map that a list of recorded transforms does to coordinates.

    It is read off from where the transforms send three corners of the image, so that any new
    augmentation is covered as long as it is affine; the fourth corner checks that it is.

    Args:
        transforms: recorded on an image of this size.
        image_size: ``(height, width)`` of the original image in pixels.

    Returns:
        ``(3, 3)`` float64 matrix, original image -> view, for ``(x, y, 1)`` columns.

    Raises:
        ValueError: if the transforms are not affine.
    """
    height, width = image_size
    corners = np.array([[0, 0], [width, 0], [0, height], [width, height]], dtype=np.float64)
    origin, right, down, opposite = np.asarray(transforms.apply_coords(corners.copy()))
    expected = right + down - origin
    # As numpy's allclose, of which each view would pay a tenth of a millisecond.
    if not (abs(opposite - expected) <= 1e-2 + 1e-5 * abs(expected)).all():
        raise ValueError(
            f"the transforms are not affine: they send the corner {(width, height)} to "
            f"{opposite.tolist()} and not to {expected.tolist()}: {transforms}"
        )
    matrix = np.eye(3)
    matrix[:2, 0] = (right - origin) / width
    matrix[:2, 1] = (down - origin) / height
    matrix[:2, 2] = origin
    return torch.from_numpy(matrix)
