"""Augmentations that Detectron2 does not have, as Detectron2 ``Augmentation`` objects.

All take and give ``(H, W, 3)`` uint8 images in **RGB**: saturation, gray and hue mean something
else when the channels are swapped. The mapper swaps them at the very end where a model wants BGR.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.data.detection_utils import build_augmentation
from PIL import ImageFilter

from . import color_ops as colors

Fill = tuple[float, float, float]


class ResizeShortestEdge(T.ResizeShortestEdge):
    """Detectron2's, but an image's short side keeps a pixel, however much longer the other is."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        resize = super().get_transform(image)
        if isinstance(resize, T.NoOpTransform):
            return resize
        height, width = max(1, resize.new_h), max(1, resize.new_w)
        return T.ResizeTransform(resize.h, resize.w, height, width, resize.interp)


def resize_and_flip(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """What Detectron2 does by default, by the same ``INPUT`` keys, for images of any shape."""
    resize, *others = build_augmentation(cfg, is_train)
    sizes = resize.short_edge_length, resize.max_size, resize.sample_style
    return [ResizeShortestEdge(*sizes), *others]


class AffineTransform(T.Transform):
    """Maps coordinates by a matrix; the image keeps its size, what comes from outside is filled."""

    def __init__(self, matrix: np.ndarray, fill: Fill) -> None:
        """
        Args:
            matrix: ``(3, 3)``, continuous pixel coordinates -> the same after the transform.
            fill: RGB color of what was outside of the image.
        """
        super().__init__()
        self.matrix = matrix
        self.fill = fill

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        return self._warp(img, cv2.INTER_LINEAR, self.fill)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return self._warp(segmentation, cv2.INTER_NEAREST, 0)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return coords @ self.matrix[:2, :2].T + self.matrix[:2, 2]

    def inverse(self) -> T.Transform:
        return AffineTransform(np.linalg.inv(self.matrix), self.fill)

    def _warp(self, img: np.ndarray, interpolation: int, fill: Fill | int) -> np.ndarray:
        # OpenCV counts from the center of the first pixel, which lies at (0.5, 0.5).
        half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
        matrix = np.linalg.inv(half) @ self.matrix @ half
        size = (img.shape[1], img.shape[0])
        return cv2.warpAffine(img, matrix[:2], size, flags=interpolation, borderValue=fill)


class RandomGeometry(T.Augmentation):
    """One of translation, rotation and shear, about the center of the image."""

    def __init__(
        self,
        fill: Fill,
        max_translation: float = 0.1,
        max_rotation: float = 30.0,
        max_shear: float = 30.0,
    ) -> None:
        """
        Args:
            fill: RGB color of what was outside of the image.
            max_translation: share of the image's width and height.
            max_rotation, max_shear: degrees.
        """
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> T.Transform:
        height, width = image.shape[:2]
        draw = (self._translation, self._rotation, self._shear)[np.random.randint(3)]
        to_origin = np.array([[1, 0, -width / 2], [0, 1, -height / 2], [0, 0, 1]])
        return AffineTransform(
            np.linalg.inv(to_origin) @ draw(width, height) @ to_origin, self.fill
        )

    def _translation(self, width: int, height: int) -> np.ndarray:
        x, y = np.random.uniform(-self.max_translation, self.max_translation, size=2)
        return np.array([[1, 0, x * width], [0, 1, y * height], [0, 0, 1]])

    def _rotation(self, width: int, height: int) -> np.ndarray:
        angle = math.radians(np.random.uniform(-self.max_rotation, self.max_rotation))
        cos, sin = math.cos(angle), math.sin(angle)
        return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])

    def _shear(self, width: int, height: int) -> np.ndarray:
        angles = np.random.uniform(-self.max_shear, self.max_shear, size=2)
        x, y = np.tan(np.radians(angles))
        # One axis at a time: both at once can fold the image onto a line.
        along_x = np.array([[1, x, 0], [0, 1, 0], [0, 0, 1]])
        along_y = np.array([[1, 0, 0], [y, 1, 0], [0, 0, 1]])
        return along_x if np.random.uniform() < 0.5 else along_y


class OneColorOperation(T.Augmentation):
    """One color operation out of nine, of random strength (the list of Soft Teacher)."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        strength = np.random.uniform(0.1, 1.9)  # of an enhancement; 1 is the identity
        operations: list[Callable[[np.ndarray], np.ndarray]] = [
            lambda img: img,
            colors.autocontrast,
            colors.equalize,
            lambda img: colors.solarize(img, int(128 * strength)),
            lambda img: colors.posterize(img, 4 + int(2 * strength)),
            lambda img: colors.saturation(img, strength),
            lambda img: colors.contrast(img, strength),
            lambda img: colors.brightness(img, strength),
            lambda img: colors.sharpness(img, strength),
        ]
        return T.ColorTransform(operations[np.random.randint(len(operations))])


class ColorJitter(T.Augmentation):
    """Brightness, contrast, saturation and hue in random order (the list of Unbiased Teacher)."""

    def __init__(self, strength: float = 0.4, hue: float = 0.1) -> None:
        """
        Args:
            strength: brightness, contrast and saturation change by up to this share.
            hue: shift of the hue by up to this share of the color circle.
        """
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> T.Transform:
        factors = np.random.uniform(1 - self.strength, 1 + self.strength, size=3)
        shift = np.random.uniform(-self.hue, self.hue)
        operations = [
            lambda img: colors.brightness(img, factors[0]),
            lambda img: colors.contrast(img, factors[1]),
            lambda img: colors.saturation(img, factors[2]),
            lambda img: colors.hue(img, shift),
        ]
        order = np.random.permutation(len(operations))
        return T.TransformList([T.ColorTransform(operations[i]) for i in order])


class Grayscale(T.Augmentation):
    """The image without color, still with three channels."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        return T.ColorTransform(colors.grayscale)


class GaussianBlur(T.Augmentation):
    """Blur of random width."""

    def __init__(self, min_sigma: float = 0.1, max_sigma: float = 2.0) -> None:
        """
        Args:
            min_sigma, max_sigma: range of the standard deviation in pixels.
        """
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> T.Transform:
        sigma = np.random.uniform(self.min_sigma, self.max_sigma)
        return T.PILColorTransform(lambda img: img.filter(ImageFilter.GaussianBlur(sigma)))


class EraseTransform(T.Transform):
    """Paints rectangles over the image; coordinates stay."""

    def __init__(self, patches: list[tuple[int, int, int, int]], fill: Fill) -> None:
        """
        Args:
            patches: xyxy in whole pixels.
            fill: RGB color of the patches.
        """
        super().__init__()
        self.patches = patches
        self.fill = fill

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        img = img.copy()
        for x1, y1, x2, y2 in self.patches:
            img[y1:y2, x1:x2] = np.round(self.fill)
        return img

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return coords

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return segmentation


class RandomErasing(T.Augmentation):
    """Paints over a random number of rectangles."""

    def __init__(
        self,
        fill: Fill,
        patches: tuple[int, int] = (1, 4),
        area: tuple[float, float] = (0.0, 0.04),
        aspect_ratio: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        """
        Args:
            fill: RGB color of the patches.
            patches: least and greatest number of them.
            area: range of the share of the image that one covers.
            aspect_ratio: range of their height over width.
        """
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> T.Transform:
        count = np.random.randint(self.patches[0], self.patches[1] + 1)
        return EraseTransform([self._patch(*image.shape[:2]) for _ in range(count)], self.fill)

    def _patch(self, height: int, width: int) -> tuple[int, int, int, int]:
        # A square root of a uniform area: sides, not areas, are what one sees.
        side = math.sqrt(height * width) * np.random.uniform(*np.sqrt(self.area))
        ratio = math.exp(np.random.uniform(*np.log(self.aspect_ratio)))
        patch_height = min(round(side * math.sqrt(ratio)), height)
        patch_width = min(round(side / math.sqrt(ratio)), width)
        x = np.random.randint(0, width - patch_width + 1)
        y = np.random.randint(0, height - patch_height + 1)
        return x, y, x + patch_width, y + patch_height
