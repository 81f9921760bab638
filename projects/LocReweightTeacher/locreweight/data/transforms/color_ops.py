"""Pillow's color operations, on arrays and at a fraction of their time.

All take and give ``(H, W, 3)`` uint8 images in RGB. Pillow brings an image into a memory layout of
its own and back, which costs more than most of its operations. Where an operation gives each of the
256 values its new one, wherever it is, Pillow is asked for these 256 and OpenCV looks them up: the
same to the bit. Of the others each function says how close it comes.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms import functional as TF

VALUES = np.arange(256, dtype=np.uint8)[None]
# A bit less than half: OpenCV rounds to the nearest, Pillow's enhancements cut off what is behind
# the point, and a whole number has to stay what it is.
CUT_OFF = -0.499


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """0 is black, 1 the image itself. Pillow's to the bit."""
    return _by_table(image, lambda values: ImageEnhance.Brightness(values).enhance(factor))


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """0 is the mean gray, 1 the image itself. Within 1 of Pillow's, as the mean may be."""
    mean = int(cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0] + 0.5)
    gray = Image.new("L", (256, 1), mean)
    return _by_table(image, lambda values: Image.blend(gray, values, factor))


def saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """0 is gray, 1 the image itself. Within 1 of Pillow's, as the gray is."""
    return cv2.addWeighted(image, factor, grayscale(image), 1 - factor, CUT_OFF)


def sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    """0 is smooth, 1 the image itself. Within 1 of Pillow's, which rounds the smooth one first."""
    smooth = np.ones((3, 3)) / 13
    smooth[1, 1] = 5 / 13
    kernel = (1 - factor) * smooth
    kernel[1, 1] += factor
    sharp = cv2.filter2D(image, -1, kernel, delta=CUT_OFF)
    # Pixels of the border lack neighbours: Pillow leaves them as they are.
    sharp[[0, -1]], sharp[:, [0, -1]] = image[[0, -1]], image[:, [0, -1]]
    return sharp


def solarize(image: np.ndarray, threshold: int) -> np.ndarray:
    """Values from the threshold on are inverted. Pillow's to the bit."""
    return _by_table(image, lambda values: ImageOps.solarize(values, threshold))


def posterize(image: np.ndarray, bits: int) -> np.ndarray:
    """Of each value only so many upper bits are kept. Pillow's to the bit."""
    return _by_table(image, lambda values: ImageOps.posterize(values, bits))


def autocontrast(image: np.ndarray) -> np.ndarray:
    """Each channel is stretched over all values. Pillow's to the bit."""
    return _by_channel(image, _stretching)


def equalize(image: np.ndarray) -> np.ndarray:
    """In each channel all values become about equally frequent. Pillow's to the bit."""
    return _by_channel(image, _equalizing)


def grayscale(image: np.ndarray) -> np.ndarray:
    """The luminance, in three channels. Within 1 of Pillow's."""
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def hue(image: np.ndarray, shift: float) -> np.ndarray:
    """Turns the color circle by a share of it. Pillow's own: OpenCV has another circle."""
    return np.asarray(TF.adjust_hue(Image.fromarray(image), shift))


def _by_table(image: np.ndarray, change: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    """Does to each value what a Pillow operation does to it, whatever its neighbours."""
    return cv2.LUT(image, np.asarray(change(Image.fromarray(VALUES))))


def _by_channel(image: np.ndarray, table_of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Looks each channel up in a table of its own, ``(1, 256)`` uint8, made for it."""
    return cv2.merge([cv2.LUT(channel, table_of(channel)) for channel in cv2.split(image)])


def _stretching(channel: np.ndarray) -> np.ndarray:
    """The table of ``ImageOps.autocontrast`` for one channel, (H, W)."""
    low, high, *_ = cv2.minMaxLoc(channel)
    # All that matters to Pillow is the least and the greatest value.
    return np.asarray(ImageOps.autocontrast(Image.fromarray(np.clip(VALUES, int(low), int(high)))))


def _equalizing(channel: np.ndarray) -> np.ndarray:
    """The table of ``ImageOps.equalize`` for one channel, (H, W)."""
    frequency = cv2.calcHist([channel], [0], None, [256], [0, 256]).ravel().astype(int)
    last = frequency[frequency > 0][-1]
    step = (channel.size - last) // 255
    if step == 0:  # too few pixels, or all of one value
        return VALUES
    below = np.cumsum(frequency) - frequency
    return np.minimum((step // 2 + below) // step, 255).astype(np.uint8)[None]
