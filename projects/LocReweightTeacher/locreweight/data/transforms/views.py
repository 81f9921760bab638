"""Augmented views of an image, the matrix of each view, and projection of boxes between views."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances
from torch import Tensor

from ...geometry import between_views, warp_boxes


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
        further_strong: strong views of further students, for methods that train several.
        read_errors: one message for each image that was drawn first but could not be read.
    """

    file_name: str
    weak: View
    strong: View
    read_errors: tuple[str, ...] = ()
    further_strong: tuple[View, ...] = ()

    def for_student(self, i: int) -> UnlabeledSample:
        """Return the sample with the strong view of a student; the first if all share one."""
        if i == 0 or not self.further_strong:
            return self
        return replace(self, strong=self.further_strong[i - 1])


def project_to_strong_view(pseudo_labels: Instances, sample: UnlabeledSample) -> Instances:
    """Project pseudo-labels from the weak to the strong view, and drop those outside of it."""
    projected = Instances(sample.strong.image_size, **pseudo_labels.get_fields())
    projected.gt_boxes = Boxes(
        project_boxes(pseudo_labels.gt_boxes.tensor, sample.weak, sample.strong)
    )
    return projected[projected.gt_boxes.nonempty(threshold=1.0).nonzero().squeeze(1)]


def project_boxes(boxes: Tensor, source: View, target: View) -> Tensor:
    """Project ``(N, 4)`` boxes from one view of an image to another, clipped to its size."""
    return warp_boxes(boxes, between_views(source.matrix, target.matrix), target.image_size)


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
