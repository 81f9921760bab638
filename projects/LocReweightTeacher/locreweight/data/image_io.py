"""Reading image files.

:func:`read_rgb` reads an image at its full size. Evaluation, prediction and the data checks use it.
:func:`read_for_training` accepts and refuses the same files, but decodes JPEGs faster, and large
ones at a reduced size.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import cv2
import numpy as np
from detectron2.data import transforms as T
from detectron2.data.detection_utils import _apply_exif_orientation, convert_PIL_to_numpy
from detectron2.utils.file_io import PathManager
from PIL import Image

from ..errors import UsageError
from .datasets.file_names import printable_name

# Pillow detects the format from a file's content, whatever the file is called. Without this list it
# would try many more formats. Some of them start other programs: Ghostscript executes EPS files.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

# A JPEG is decoded at a reduced size only if each side keeps at least this many times the pixels of
# the largest view. Reduced decoding cuts off the cosine coefficients of a block, which is not the
# same filter as resizing. With this margin the difference in a view is no larger than between two
# common resizing filters, bilinear and bicubic; with a margin of 1 it is (benchmarks/loader.py).
MIN_OVERSAMPLING = 1.5

JPEG_END_MARKER = b"\xff\xd9"
# cv2.IMREAD flags for decoding an RGB image at 1/1, 1/2, 1/4 and 1/8 of its size. OpenCV names the
# reduced ones GRAYSCALE; together with COLOR_RGB they decode in color.
JPEG_DECODE_FLAGS = {
    1: cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2 | cv2.IMREAD_COLOR_RGB,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4 | cv2.IMREAD_COLOR_RGB,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8 | cv2.IMREAD_COLOR_RGB,
}

EXIF_ORIENTATION = 0x0112
# How to display an image, by its EXIF orientation. 1 and unknown values need no change.
EXIF_TRANSFORMS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda image: cv2.flip(image, 1),
    3: lambda image: cv2.flip(image, -1),
    4: lambda image: cv2.flip(image, 0),
    5: cv2.transpose,
    6: lambda image: cv2.rotate(image, cv2.ROTATE_90_CLOCKWISE),
    7: lambda image: cv2.flip(cv2.transpose(image), -1),
    8: lambda image: cv2.rotate(image, cv2.ROTATE_90_COUNTERCLOCKWISE),
}


class UnreadableImage(UsageError):
    """An image file is missing or cannot be decoded."""


@contextlib.contextmanager
def unreadable_image_errors(file_name: str, *errors: type[Exception]) -> Iterator[None]:
    """Convert the given exceptions to :class:`UnreadableImage` with the name of the file."""
    try:
        yield
    except UnreadableImage:
        raise
    except errors as error:
        raise UnreadableImage(
            f"cannot read or augment the image {printable_name(file_name)}: {single_line(error)}. "
            "If the file is damaged, repair or remove it"
        ) from error


def single_line(error: BaseException) -> str:
    """Format an exception in one printable line. Its message may contain any file name."""
    return printable_name(" ".join(f"{type(error).__name__}: {error}".split()))


def read_rgb(file_name: str) -> np.ndarray:
    """Read an image file.

    Same as Detectron2's ``read_image(file_name, "RGB")``, which rotates the image by its EXIF
    orientation, reads the first frame only and ignores transparency. Differences: 16-bit channels
    are reduced to their upper 8 bits, as OpenCV does, whereas Pillow clips them to almost white.
    Only the formats in :data:`FORMATS` are accepted. Images above twice Pillow's
    ``MAX_IMAGE_PIXELS`` (179 million pixels) are refused by Pillow.

    Returns:
        ``(H, W, 3)`` uint8, RGB.

    Raises:
        UnreadableImage: if the file is missing or cannot be decoded; names the file.
    """
    with open_image(file_name) as (_, image):
        return decode_image(image)


@contextlib.contextmanager
def open_image(file_name: str) -> Iterator[tuple[BinaryIO, Image.Image]]:
    """Open an image file and read its header. The pixels are not decoded yet.

    Yields:
        the open file and the Pillow image.

    Raises:
        UnreadableImage: names the file. Any exception in the body of the ``with`` statement is
            converted, too, since damaged files make decoders raise all kinds of exceptions.
    """
    with unreadable_image_errors(file_name, OSError):
        # Opening a pipe would block forever. A path that does not exist may be a URL.
        if os.path.exists(file_name) and not os.path.isfile(file_name):
            raise OSError("it is not a regular file but a folder, a pipe or a device")
    with unreadable_image_errors(file_name, Exception), PathManager.open(file_name, "rb") as file:
        yield file, Image.open(file, formats=FORMATS)


def decode_image(image: Image.Image) -> np.ndarray:
    """Decode an opened image as described in :func:`read_rgb`. Returns ``(H, W, 3)`` uint8 RGB."""
    if image.format == "TIFF":
        image.load()  # Pillow rotates these files itself, and removes the orientation
    rotated: Image.Image = _apply_exif_orientation(image)
    if _has_16_bits(image):
        rotated = Image.fromarray((np.asarray(rotated) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError("32 bits per channel are not supported: the value of white is unknown")
    return convert_PIL_to_numpy(rotated, "RGB")


def _has_16_bits(image: Image.Image) -> bool:
    # PNG and PPM have no 32-bit channels, but Pillow may open their 16-bit images in mode "I".
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


@dataclass(frozen=True)
class TrainingImage:
    """A decoded image file, possibly at a reduced size.

    Attributes:
        pixels: ``(H, W, 3)`` uint8, RGB.
        shape: ``(height, width)`` of the full-size image in pixels, after the EXIF rotation. It has
            this name since Detectron2's ``check_image_size`` reads it.
    """

    pixels: np.ndarray
    shape: tuple[int, int]

    @property
    def scaling(self) -> T.Transform:
        """The transform from coordinates in the full-size image to coordinates in ``pixels``."""
        return T.ResizeTransform(*self.shape, *self.pixels.shape[:2])


@dataclass(frozen=True)
class SizeLimit:
    """The largest sides that any view of an image can have, in pixels.

    Infinite sides mean that views are not limited, and images are always decoded at full size.
    """

    short: float = math.inf
    long: float = math.inf

    def reduction(self, width: int, height: int) -> int:
        """Return the factor, 1, 2, 4 or 8, by which an image can be decoded at a smaller size."""
        # A view respects both limits, so the larger ratio bounds how much smaller a view is.
        oversampling = max(min(width, height) / self.short, max(width, height) / self.long)
        # The factor must divide both sides. Then scaling is exact, also after an EXIF rotation.
        return next(
            (
                factor
                for factor in (8, 4, 2)
                if width % factor == 0 == height % factor
                and oversampling >= factor * MIN_OVERSAMPLING
            ),
            1,
        )


@functools.cache
def image_size(file_name: str) -> tuple[int, int]:
    """Width and height of an image after EXIF rotation, usually from the header of its file.

    Cached, because evaluation asks again and again.

    Raises:
        UnreadableImage: if the file is missing or its header cannot be read; names the file.
    """
    with open_image(file_name) as (_, image):
        is_transposed = _exif_orientation(image) in (5, 6, 7, 8)
        if is_transposed and image.format == "TIFF":
            # Pillow rotates these files itself; some versions change the size when they decode it.
            image.load()
            return image.size
        width, height = image.size
        return (height, width) if is_transposed else (width, height)


def read_for_training(file_name: str, limit: SizeLimit) -> TrainingImage:
    """Read an image file to make views of limited size.

    Plain JPEGs are decoded by OpenCV, which uses the same JPEG library as Pillow and is faster. At
    full size the pixels are equal to those of :func:`read_rgb`, and the same files are refused.

    Raises:
        UnreadableImage: if the file is missing or cannot be decoded; names the file.
    """
    with open_image(file_name) as (file, image):
        width, height = image.size
        pixels = _decode_jpeg(file, image, limit.reduction(width, height))
        if pixels is None:
            pixels = decode_image(image)
            return TrainingImage(pixels, pixels.shape[:2])
        orientation = _exif_orientation(image)
        if orientation in EXIF_TRANSFORMS:
            pixels = EXIF_TRANSFORMS[orientation](pixels)
        is_transposed = orientation in (5, 6, 7, 8)
        return TrainingImage(pixels, (width, height) if is_transposed else (height, width))


def _decode_jpeg(file: BinaryIO, image: Image.Image, reduction: int) -> np.ndarray | None:
    """Decode a plain JPEG, without rotating it.

    Returns:
        ``(H, W, 3)`` uint8 RGB, or None if Pillow must decode the file or report what is wrong.
    """
    if image.format != "JPEG" or image.mode not in ("RGB", "L"):
        return None
    file.seek(0)
    content = file.read()
    # OpenCV decodes what is left of a truncated file. Pillow refuses it.
    if not content.endswith(JPEG_END_MARKER):
        return None
    flags = JPEG_DECODE_FLAGS[reduction] | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        pixels = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    except cv2.error:
        return None
    width, height = image.size
    expected = (height // reduction, width // reduction)
    return pixels if pixels is not None and pixels.shape[:2] == expected else None


def _exif_orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # Pillow raises all kinds of exceptions; Detectron2 ignores them as well
        return 1
