"""Augmentations that Detectron2 does not have.

Torchvision has some of them. These are Detectron2 ``Augmentation`` classes: they draw from numpy's
generator and record transforms, from which the matrix of a view is computed.

All images are ``(H, W, 3)`` uint8 **RGB**, since saturation, hue and grayscale depend on the
channel order. If the model takes BGR, the mapper swaps the channels afterwards.
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

from . import color_ops

Color = tuple[float, float, float]  # RGB, 0 to 255


class ResizeShortestEdge(T.ResizeShortestEdge):
    """Detectron2's ``ResizeShortestEdge``, but sides of very elongated images keep a pixel."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        resize = super().get_transform(image)
        if isinstance(resize, T.NoOpTransform):
            return resize
        height, width = max(1, resize.new_h), max(1, resize.new_w)
        return T.ResizeTransform(resize.h, resize.w, height, width, resize.interp)


def resize_and_flip(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """Build Detectron2's default augmentations from the same ``INPUT`` keys.

    Unlike ``build_augmentation``, they accept images of any aspect ratio.
    """
    resize, *others = build_augmentation(cfg, is_train)
    sizes = resize.short_edge_length, resize.max_size, resize.sample_style
    return [ResizeShortestEdge(*sizes), *others]


class AffineTransform(T.Transform):
    """Affine transform that keeps the size of the image and fills areas from outside of it."""

    def __init__(self, matrix: np.ndarray, fill: Color) -> None:
        """
        Args:
            matrix: ``(3, 3)``, maps continuous pixel coordinates before to those after the
                transform.
            fill: color of areas that were outside of the image.
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

    def _warp(self, img: np.ndarray, interpolation: int, fill: Color | int) -> np.ndarray:
        # OpenCV puts the origin at the center of the first pixel, Detectron2 at its corner.
        offset = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
        matrix = np.linalg.inv(offset) @ self.matrix @ offset
        size = (img.shape[1], img.shape[0])
        return cv2.warpAffine(img, matrix[:2], size, flags=interpolation, borderValue=fill)


class RandomGeometricOperation(T.Augmentation):
    """Randomly translate, rotate or shear the image about its center (Soft Teacher)."""

    def __init__(
        self,
        fill: Color,
        max_translation: float = 0.1,
        max_rotation: float = 30.0,
        max_shear: float = 30.0,
    ) -> None:
        """
        Args:
            fill: color of areas that were outside of the image.
            max_translation: largest shift, as a fraction of the image's width and height.
            max_rotation, max_shear: largest angles in degrees.
        """
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> T.Transform:
        height, width = image.shape[:2]
        operation = (self._translation, self._rotation, self._shear)[np.random.randint(3)]
        to_origin = np.array([[1, 0, -width / 2], [0, 1, -height / 2], [0, 0, 1]])
        return AffineTransform(
            np.linalg.inv(to_origin) @ operation(width, height) @ to_origin, self.fill
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
        # Shear along one axis only: shearing along both can collapse the image to a line.
        along_x = np.array([[1, x, 0], [0, 1, 0], [0, 0, 1]])
        along_y = np.array([[1, 0, 0], [y, 1, 0], [0, 0, 1]])
        return along_x if np.random.uniform() < 0.5 else along_y


class RandomColorOperation(T.Augmentation):
    """Apply one of nine color operations with random strength (Soft Teacher)."""

    def __init__(self) -> None:
        """No arguments. Detectron2 shows the arguments of augmentations in its log."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        strength = np.random.uniform(0.1, 1.9)  # 1 leaves the image unchanged in the last four
        operations: list[Callable[[np.ndarray], np.ndarray]] = [
            lambda img: img,
            color_ops.autocontrast,
            color_ops.equalize,
            lambda img: color_ops.solarize(img, int(128 * strength)),
            lambda img: color_ops.posterize(img, 4 + int(2 * strength)),
            lambda img: color_ops.saturation(img, strength),
            lambda img: color_ops.contrast(img, strength),
            lambda img: color_ops.brightness(img, strength),
            lambda img: color_ops.sharpness(img, strength),
        ]
        return T.ColorTransform(operations[np.random.randint(len(operations))])


class ColorJitter(T.Augmentation):
    """Change brightness, contrast, saturation and hue in random order (Unbiased Teacher)."""

    def __init__(self, strength: float = 0.4, hue: float = 0.1) -> None:
        """
        Args:
            strength: largest relative change of brightness, contrast and saturation.
            hue: largest shift of the hue, as a fraction of the color circle.
        """
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> T.Transform:
        factors = np.random.uniform(1 - self.strength, 1 + self.strength, size=3)
        shift = np.random.uniform(-self.hue, self.hue)
        operations = [
            lambda img: color_ops.brightness(img, factors[0]),
            lambda img: color_ops.contrast(img, factors[1]),
            lambda img: color_ops.saturation(img, factors[2]),
            lambda img: color_ops.hue(img, shift),
        ]
        order = np.random.permutation(len(operations))
        return T.TransformList([T.ColorTransform(operations[i]) for i in order])


class Grayscale(T.Augmentation):
    """Convert the image to grayscale, with three channels."""

    def __init__(self) -> None:
        """No arguments. Detectron2 shows the arguments of augmentations in its log."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        return T.ColorTransform(color_ops.grayscale)


class GaussianBlur(T.Augmentation):
    """Blur the image with a Gaussian filter of random width."""

    def __init__(self, min_sigma: float = 0.1, max_sigma: float = 2.0) -> None:
        """
        Args:
            min_sigma, max_sigma: range of the filter's standard deviation in pixels.
        """
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> T.Transform:
        sigma = np.random.uniform(self.min_sigma, self.max_sigma)
        return T.PILColorTransform(lambda img: img.filter(ImageFilter.GaussianBlur(sigma)))


class PhotometricOperations(T.Augmentation):
    """Apply each of five groups of color operations with a probability (Instant-Teaching)."""

    def __init__(self, prob: float = 0.2) -> None:
        """
        Args:
            prob: probability of each group.
        """
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> T.Transform:
        contrast, brightness = np.random.uniform(0.1, 0.3, size=2)
        channels = np.random.uniform(-10, 10, size=3)
        hsv = np.random.uniform(-1, 1, size=3) * (20, 30, 20)
        quality = np.random.randint(85, 96)
        order = np.random.permutation(3)
        groups: list[list[Callable[[np.ndarray], np.ndarray]]] = [
            [lambda img: _to_uint8((1 + contrast) * img + 255 * brightness)],
            [lambda img: _to_uint8(img + channels), lambda img: color_ops.shift_hsv(img, *hsv)],
            [lambda img: color_ops.jpeg(img, quality)],
            [lambda img: np.ascontiguousarray(img[:, :, order])],
            [lambda img: cv2.blur(img, (3, 3)), lambda img: cv2.medianBlur(img, 3)],
        ]
        drawn = [group[np.random.randint(len(group))] for group in groups]
        used = np.random.uniform(size=len(groups)) < self.prob
        return T.TransformList(
            [T.ColorTransform(op) for op, use in zip(drawn, used, strict=True) if use]
        )


def _to_uint8(image: np.ndarray) -> np.ndarray:
    return np.clip(np.round(image), 0, 255).astype(np.uint8)


class EraseTransform(T.Transform):
    """Fill rectangles of the image with a color. Coordinates do not change."""

    def __init__(self, patches: list[tuple[int, int, int, int]], fill: Color) -> None:
        """
        Args:
            patches: rectangles, xyxy in whole pixels.
            fill: color of the patches.
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
    """Fill a random number of random rectangles with a color.

    Unlike torchvision's ``RandomErasing``, it draws any number of patches, and the side of a patch
    is distributed uniformly instead of its area.
    """

    def __init__(
        self,
        fill: Color,
        patches: tuple[int, int] = (1, 4),
        area: tuple[float, float] = (0.0, 0.04),
        aspect_ratio: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        """
        Args:
            fill: color of the patches.
            patches: smallest and largest number of patches.
            area: range of a patch's area, as a fraction of the image's.
            aspect_ratio: range of a patch's height divided by its width.
        """
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> T.Transform:
        count = np.random.randint(self.patches[0], self.patches[1] + 1)
        return EraseTransform([self._patch(*image.shape[:2]) for _ in range(count)], self.fill)

    def _patch(self, height: int, width: int) -> tuple[int, int, int, int]:
        side = math.sqrt(height * width) * np.random.uniform(*np.sqrt(self.area))
        ratio = math.exp(np.random.uniform(*np.log(self.aspect_ratio)))
        patch_height = min(round(side * math.sqrt(ratio)), height)
        patch_width = min(round(side / math.sqrt(ratio)), width)
        x = np.random.randint(0, width - patch_width + 1)
        y = np.random.randint(0, height - patch_height + 1)
        return x, y, x + patch_width, y + patch_height


class Cutout(T.Augmentation):
    """Fill squares around random pixels with black (DeVries and Taylor, 2017)."""

    def __init__(self, holes: int = 8, side: int = 8) -> None:
        """
        Args:
            holes: number of squares, which may overlap.
            side: of a square, in pixels. Squares are cut off at the border.
        """
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> T.Transform:
        height, width = image.shape[:2]
        patches = []
        for _ in range(self.holes):
            x = np.random.randint(width) - self.side // 2
            y = np.random.randint(height) - self.side // 2
            patches.append((max(x, 0), max(y, 0), x + self.side, y + self.side))
        return EraseTransform(patches, (0.0, 0.0, 0.0))
