"""Faster pixel operations for Detectron2's transforms.

Detectron2 resizes with Pillow and flips with numpy views; here OpenCV and PyTorch do both, several
times as fast (benchmarks/loader.py). What augmentations draw, and how recorded transforms map
coordinates, is unchanged. Any augmentation that records Detectron2's transforms benefits.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
from detectron2.data import transforms as T
from PIL import Image
from torch.nn import functional as F


class FastAugInput(T.AugInput):
    """Detectron2's ``AugInput`` with faster resizing and flipping of ``(H, W, 3)`` uint8 images."""

    image: np.ndarray

    def __init__(self, image: np.ndarray, resize_cache: dict | None = None) -> None:
        """
        Args:
            image: the image before the first augmentation. It is not modified.
            resize_cache: resized versions of this image by ``(height, width)``, filled on demand.
                Pass the same dict for several views of an image to resize to each size only once.
        """
        # Views share these arrays. Read-only arrays make in-place augmentations raise an error.
        super().__init__(_read_only(image))
        self._original, self._original_view = image, self.image
        self._resize_cache = {} if resize_cache is None else resize_cache

    def transform(self, tfm: T.Transform) -> None:
        """Apply a recorded transform to the image, in place."""
        for single in tfm.transforms if isinstance(tfm, T.TransformList) else [tfm]:
            self.image = self._apply(single)

    def _apply(self, transform: T.Transform) -> np.ndarray:
        # Compare exact types: subclasses may treat pixels differently.
        kind = type(transform)
        if kind is T.ResizeTransform and transform.interp == Image.Resampling.BILINEAR:
            return self._resize(transform.new_h, transform.new_w)
        # numpy flips by negative strides, which slow down every later operation.
        if kind is T.HFlipTransform:
            return cv2.flip(self.image, 1)
        if kind is T.VFlipTransform:
            return cv2.flip(self.image, 0)
        return transform.apply_image(self.image)

    def _resize(self, height: int, width: int) -> np.ndarray:
        if self.image is not self._original_view:
            return resize_bilinear(self.image, height, width)
        if (height, width) not in self._resize_cache:
            self._resize_cache[height, width] = resize_bilinear(self._original, height, width)
        return _read_only(self._resize_cache[height, width])


def resize_bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize an image with an antialiased bilinear filter, within 1 level of Pillow's result.

    Args:
        image: ``(H, W, 3)`` uint8.

    Returns:
        ``(height, width, 3)`` uint8.
    """
    if height >= image.shape[0] and width >= image.shape[1]:
        # Enlarging needs no antialiasing, which OpenCV's bilinear filter does not have.
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    # PyTorch implements Pillow's filter for uint8. from_numpy requires writable memory.
    writable = torch.from_numpy(np.require(image, requirements=["C", "W"])).permute(2, 0, 1)[None]
    planes = F.interpolate(writable, (height, width), mode="bilinear", antialias=True)[0]
    return cv2.merge([plane.numpy() for plane in planes])


def channels_first(image: np.ndarray, image_format: str) -> torch.Tensor:
    """Convert an ``(H, W, 3)`` RGB image to a ``(3, H, W)`` tensor in the order "RGB" or "BGR"."""
    planes = np.empty((3, *image.shape[:2]), image.dtype)
    cv2.split(image, list(planes if image_format == "RGB" else planes[::-1]))
    return torch.from_numpy(planes)


def _read_only(image: np.ndarray) -> np.ndarray:
    view = image.view()
    view.flags.writeable = False
    return view
