"""Pillow's color operations on numpy arrays, faster.

Images are ``(H, W, 3)`` uint8 RGB. From array to array, these functions are 1.2 (equalize) to 9
(sharpness) times as fast as Pillow, which converts the array to its own memory layout and back
(benchmarks/loader.py). If an operation maps each of the 256 values independently of its position,
Pillow computes the lookup table and OpenCV applies it, with exactly Pillow's result. The other
functions state their difference.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms import functional as TF

VALUES = np.arange(256, dtype=np.uint8)[None]
# Pillow's enhancements truncate to integers, OpenCV rounds. Adding this before rounding truncates.
# It is slightly less than one half so that integers stay the same.
TRUNCATION_OFFSET = -0.499


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Change the brightness; factor 0 is black, 1 the original. Equal to Pillow."""
    return _apply_table(image, lambda values: ImageEnhance.Brightness(values).enhance(factor))


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Change the contrast; factor 0 is the mean gray, 1 the original.

    Within 1 level of Pillow, since the mean may be.
    """
    mean = int(cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0] + 0.5)
    gray = Image.new("L", (256, 1), mean)
    return _apply_table(image, lambda values: Image.blend(gray, values, factor))


def saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Change the saturation; factor 0 is grayscale, 1 the original. Within 1 level of Pillow."""
    return cv2.addWeighted(image, factor, grayscale(image), 1 - factor, TRUNCATION_OFFSET)


def sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    """Change the sharpness; factor 0 is smoothed, 1 the original.

    Within 1 level of Pillow, which rounds the smoothed image first.
    """
    smooth = np.ones((3, 3)) / 13
    smooth[1, 1] = 5 / 13
    kernel = (1 - factor) * smooth
    kernel[1, 1] += factor
    sharp = cv2.filter2D(image, -1, kernel, delta=TRUNCATION_OFFSET)
    # Pillow leaves the pixels of the border unchanged.
    sharp[[0, -1]], sharp[:, [0, -1]] = image[[0, -1]], image[:, [0, -1]]
    return sharp


def solarize(image: np.ndarray, threshold: int) -> np.ndarray:
    """Invert all values greater than or equal to the threshold. Equal to Pillow."""
    return _apply_table(image, lambda values: ImageOps.solarize(values, threshold))


def posterize(image: np.ndarray, bits: int) -> np.ndarray:
    """Keep only the given number of upper bits of each value. Equal to Pillow."""
    return _apply_table(image, lambda values: ImageOps.posterize(values, bits))


def autocontrast(image: np.ndarray) -> np.ndarray:
    """Stretch each channel to the full range 0 to 255. Equal to Pillow."""
    return _apply_channel_tables(image, _autocontrast_table)


def equalize(image: np.ndarray) -> np.ndarray:
    """Equalize the histogram of each channel. Equal to Pillow."""
    return _apply_channel_tables(image, _equalization_table)


def grayscale(image: np.ndarray) -> np.ndarray:
    """Convert to grayscale (luminance), with three channels. Within 1 level of Pillow."""
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def hue(image: np.ndarray, shift: float) -> np.ndarray:
    """Shift the hue by a fraction of the color circle. Uses Pillow: OpenCV's hue differs."""
    return np.asarray(TF.adjust_hue(Image.fromarray(image), shift))


def shift_hsv(image: np.ndarray, hue: float, saturation: float, value: float) -> np.ndarray:
    """Shift the hue (180 is a full circle), and add to saturation and value (0 to 255)."""
    shifted = cv2.cvtColor(image, cv2.COLOR_RGB2HSV) + np.array([hue, saturation, value])
    shifted[:, :, 0] %= 180
    return cv2.cvtColor(np.clip(shifted, 0, 255).astype(np.uint8), cv2.COLOR_HSV2RGB)


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """Compress as JPEG with a quality of 0 to 100, and decode again."""
    _, encoded = cv2.imencode(
        ".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality]
    )
    return cv2.cvtColor(cv2.imdecode(encoded, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def _apply_table(image: np.ndarray, operation: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    """Apply a Pillow operation that maps each value independently, through a lookup table."""
    return cv2.LUT(image, np.asarray(operation(Image.fromarray(VALUES))))


def _apply_channel_tables(
    image: np.ndarray, table_of: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Apply a lookup table, ``(1, 256)`` uint8, that is computed for each channel."""
    return cv2.merge([cv2.LUT(channel, table_of(channel)) for channel in cv2.split(image)])


def _autocontrast_table(channel: np.ndarray) -> np.ndarray:
    """Return the lookup table of ``ImageOps.autocontrast`` for a channel, ``(H, W)``."""
    low, high, *_ = cv2.minMaxLoc(channel)
    # The table depends on the smallest and the largest value only.
    return np.asarray(ImageOps.autocontrast(Image.fromarray(np.clip(VALUES, int(low), int(high)))))


def _equalization_table(channel: np.ndarray) -> np.ndarray:
    """Return the lookup table of ``ImageOps.equalize`` for a channel, ``(H, W)``."""
    frequency = cv2.calcHist([channel], [0], None, [256], [0, 256]).ravel().astype(int)
    last = frequency[frequency > 0][-1]
    step = (channel.size - last) // 255
    if step == 0:  # too few pixels, or all have the same value
        return VALUES
    below = np.cumsum(frequency) - frequency
    return np.minimum((step // 2 + below) // step, 255).astype(np.uint8)[None]
