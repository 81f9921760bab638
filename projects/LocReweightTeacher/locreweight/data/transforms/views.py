"""Augmented views of an image, with the matrix that maps the original image to each view."""

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
        matrix: ``(3, 3)`` float64, maps pixel coordinates of the original image to the view.
    """

    image: Tensor
    matrix: Tensor

    @property
    def image_size(self) -> tuple[int, int]:
        """``(height, width)`` in pixels."""
        return self.image.shape[1], self.image.shape[2]


@dataclass(frozen=True)
class UnlabeledSample:
    """The two views of an unlabeled image.

    Attributes:
        file_name: the image file.
        weak: the view that the teacher labels.
        strong: the view that the student learns from.
        read_errors: one message for each image that was drawn first but could not be read.
    """

    file_name: str
    weak: View
    strong: View
    read_errors: tuple[str, ...] = ()


def affine_matrix(transforms: T.TransformList, image_size: tuple[int, int]) -> Tensor:
    """Compute the affine matrix of a list of recorded transforms.

    The matrix follows from where the transforms map three corners of the image. This works for any
    affine augmentation without extra code. The fourth corner checks that the map is affine.

    Args:
        transforms: recorded on an image of size ``image_size``.
        image_size: ``(height, width)`` of the original image in pixels.

    Returns:
        ``(3, 3)`` float64 matrix that maps columns ``(x, y, 1)`` of the original image to the view.

    Raises:
        ValueError: if the transforms are not affine.
    """
    height, width = image_size
    corners = np.array([[0, 0], [width, 0], [0, height], [width, height]], dtype=np.float64)
    origin, right, down, opposite = np.asarray(transforms.apply_coords(corners.copy()))
    expected = right + down - origin
    # np.allclose does the same but costs a tenth of a millisecond per view.
    if not (abs(opposite - expected) <= 1e-2 + 1e-5 * abs(expected)).all():
        raise ValueError(
            f"the transforms are not affine: they map the corner {(width, height)} to "
            f"{opposite.tolist()}, an affine map would map it to {expected.tolist()}: {transforms}"
        )
    matrix = np.eye(3)
    matrix[:2, 0] = (right - origin) / width
    matrix[:2, 1] = (down - origin) / height
    matrix[:2, 2] = origin
    return torch.from_numpy(matrix)
