"""Detectron2's own transforms of pixels, faster than it does them.

What an augmentation draws, and what its recorded transform does to coordinates, stays Detectron2's:
only the arithmetic on the image is another. Augmentations of any recipe profit that record these
transforms, Detectron2's and others.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
from detectron2.data import transforms as T
from PIL import Image
from torch.nn import functional as F


class FastInput(T.AugInput):
    """An image while it is augmented: ``(H, W, 3)`` uint8, RGB."""

    image: np.ndarray

    def __init__(self, image: np.ndarray, resized_before: dict | None = None) -> None:
        """
        Args:
            image: as it is before the first augmentation; it is kept.
            resized_before: of the same image, by height and width; is added to. Views that have
                one size share the work, however they differ afterwards.
        """
        # What views share can only be read: augmentations that write in place are to fail.
        super().__init__(_read_only(image))
        self._original, self._shown = image, self.image
        self._resized_before = {} if resized_before is None else resized_before

    def transform(self, tfm: T.Transform) -> None:
        """Transforms the image in place, as a recorded transform says."""
        for single in tfm.transforms if isinstance(tfm, T.TransformList) else [tfm]:
            self.image = self._apply(single)

    def _apply(self, transform: T.Transform) -> np.ndarray:
        # By the exact type: a class derived from one of these may do something else to pixels.
        kind = type(transform)
        if kind is T.ResizeTransform and transform.interp == Image.Resampling.BILINEAR:
            return self._resize(transform.new_h, transform.new_w)
        # numpy's flips leave the pixels where they are, for each later step to collect them
        # backwards.
        if kind is T.HFlipTransform:
            return cv2.flip(self.image, 1)
        if kind is T.VFlipTransform:
            return cv2.flip(self.image, 0)
        return transform.apply_image(self.image)

    def _resize(self, height: int, width: int) -> np.ndarray:
        if self.image is not self._shown:
            return resized(self.image, height, width)
        if (height, width) not in self._resized_before:
            self._resized_before[height, width] = resized(self._original, height, width)
        return _read_only(self._resized_before[height, width])


def resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear, and smoothed before pixels are left out: within 1 of what Pillow does.

    Args:
        image: ``(H, W, 3)`` uint8.

    Returns:
        ``(height, width, 3)`` uint8.
    """
    if height >= image.shape[0] and width >= image.shape[1]:
        # Nothing is left out, so there is nothing to smooth, which OpenCV never does.
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    # torch has Pillow's filter on bytes. It wants memory that it may write to.
    given = torch.from_numpy(np.require(image, requirements=["C", "W"])).permute(2, 0, 1)[None]
    planes = F.interpolate(given, (height, width), mode="bilinear", antialias=True)[0]
    return cv2.merge([plane.numpy() for plane in planes])


def channels_first(image: np.ndarray, image_format: str) -> torch.Tensor:
    """``(H, W, 3)`` RGB -> ``(3, H, W)`` in the order "RGB" or "BGR", in one pass."""
    planes = np.empty((3, *image.shape[:2]), image.dtype)
    cv2.split(image, list(planes if image_format == "RGB" else planes[::-1]))
    return torch.from_numpy(planes)


def _read_only(image: np.ndarray) -> np.ndarray:
    view = image.view()
    view.flags.writeable = False
    return view
