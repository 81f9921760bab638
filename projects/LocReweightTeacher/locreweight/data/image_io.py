"""Image files: which are read, and how they become RGB."""

from __future__ import annotations

import contextlib
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

# Pillow knows many more by their content, whatever the file's name. Some start other programs:
# an EPS file is run by Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


class UnreadableImage(UsageError):
    """An image file that is missing or cannot be decoded."""


def read_rgb(file_name: str) -> np.ndarray:
    """The pixels of an image file, as training and evaluation see them.

    Detectron2's reading, rotation by EXIF included, but 16 bits become 8 by dropping the lower
    ones, as OpenCV does it, where Pillow alone makes nearly everything white. Of several frames the
    first counts; opacity is ignored. Images above twice Pillow's ``MAX_IMAGE_PIXELS`` (179 million
    pixels) are refused.

    Returns:
        ``(H, W, 3)`` uint8, RGB.

    Raises:
        UnreadableImage: names the file.
    """
    with open_image(file_name) as (_, stored):
        return decode_image(stored)


@contextlib.contextmanager
def open_image(file_name: str) -> Iterator[tuple[BinaryIO, Image.Image]]:
    """An image file and what Pillow knows before it decodes it.

    Raises:
        UnreadableImage: names the file, also for whatever goes wrong while it is open.
    """
    with unreadable_image_errors(file_name, OSError):
        # Opening a pipe would never end. What is not there at all may be an address.
        if os.path.exists(file_name) and not os.path.isfile(file_name):
            raise OSError("it is no file, but a folder, a pipe or a device")
    # Whatever a damaged file makes the decoder raise.
    with unreadable_image_errors(file_name, Exception), PathManager.open(file_name, "rb") as file:
        yield file, Image.open(file, formats=FORMATS)


def decode_image(stored: Image.Image) -> np.ndarray:
    """Decodes an opened image file: :func:`read_rgb` says how."""
    image: Image.Image = _apply_exif_orientation(stored)
    if _has_sixteen_bits(stored):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif stored.mode in ("I", "F"):
        raise ValueError("with 32 bits for a pixel it is not known how bright white is")
    return convert_PIL_to_numpy(image, "RGB")


@contextlib.contextmanager
def unreadable_image_errors(file_name: str, *errors: type[Exception]) -> Iterator[None]:
    """Turns errors into :class:`UnreadableImage`, which names the file."""
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
    """An error for a message, which may quote the name of a file."""
    return printable_name(" ".join(f"{type(error).__name__}: {error}".split()))


def _has_sixteen_bits(image: Image.Image) -> bool:
    # Formats without 32 bits that Pillow nevertheless may hold in as many.
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


# --------------------------------------------------------------------------------------------------
# Image files as training reads them: as evaluation does, but JPEGs faster, and large ones smaller.
#
# Pillow opens every file, so what is refused is the same; but for plain JPEGs OpenCV decodes, with
# the same library, straight into an array.


# A JPEG is decoded at 1/2, 1/4 or 1/8 if this leaves so many pixels for one of the view. Its blocks
# of cosines are then cut off at another frequency than resizing would smooth at. With this share
# that changes a view no more than another usual filter would, bicubic or area (benchmarks/loader.py
# measures it); with 1, more.
SPARE = 1.5

END_OF_JPEG = b"\xff\xd9"
DECODED_AT = {
    1: cv2.IMREAD_COLOR_RGB,
    # The other flags of one name and scale ask for BGR.
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2 | cv2.IMREAD_COLOR_RGB,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4 | cv2.IMREAD_COLOR_RGB,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8 | cv2.IMREAD_COLOR_RGB,
}

EXIF_ORIENTATION = 0x0112
# What a value of EXIF's orientation asks for; 1 and all unknown ones ask for nothing.
TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda image: cv2.flip(image, 1),
    3: lambda image: cv2.flip(image, -1),
    4: lambda image: cv2.flip(image, 0),
    5: cv2.transpose,
    6: lambda image: cv2.rotate(image, cv2.ROTATE_90_CLOCKWISE),
    7: lambda image: cv2.flip(cv2.transpose(image), -1),
    8: lambda image: cv2.rotate(image, cv2.ROTATE_90_COUNTERCLOCKWISE),
}


@dataclass(frozen=True)
class TrainingImage:
    """An image file, decoded at its own or at a smaller size.

    Attributes:
        pixels: ``(H, W, 3)`` uint8, RGB.
        shape: ``(height, width)`` in pixels as the file has it, after EXIF's rotation; named as an
            array's, for Detectron2's check of sizes.
    """

    pixels: np.ndarray
    shape: tuple[int, int]

    @property
    def scaling(self) -> T.Transform:
        """Coordinates of the file's image -> coordinates in ``pixels``."""
        return T.ResizeTransform(*self.shape, *self.pixels.shape[:2])


@dataclass(frozen=True)
class SizeLimit:
    """No view of an image has longer sides than these, in pixels; infinite: they keep its size."""

    short: float = math.inf
    long: float = math.inf

    def reduction(self, width: int, height: int) -> int:
        """By how much, 1, 2, 4 or 8, an image can be smaller than its file says."""
        # A view has to keep within both, so the stricter one says how much smaller it is at least.
        spare = max(min(width, height) / self.short, max(width, height) / self.long)
        # Whole blocks alone: then the image is exactly so much smaller, also when it is turned.
        fitting = (n for n in (8, 4, 2) if width % n == 0 == height % n and spare >= n * SPARE)
        return next(fitting, 1)


def read_for_training(file_name: str, limit: SizeLimit) -> TrainingImage:
    """Reads an image file of which views within a limit are to be made.

    Raises:
        UnreadableImage: names the file.
    """
    with open_image(file_name) as (file, stored):
        width, height = stored.size
        pixels = _decode_jpeg(file, stored, limit.reduction(width, height))
        if pixels is None:
            pixels = decode_image(stored)
            return TrainingImage(pixels, pixels.shape[:2])
        orientation = _orientation(stored)
        turned = TURNS[orientation](pixels) if orientation in TURNS else pixels
        return TrainingImage(
            turned, (width, height) if orientation in (5, 6, 7, 8) else (height, width)
        )


def _decode_jpeg(file: BinaryIO, stored: Image.Image, reduction: int) -> np.ndarray | None:
    """The pixels as they are stored, or None where Pillow has to decode or to say what is wrong."""
    if stored.format != "JPEG" or stored.mode not in ("RGB", "L"):
        return None
    file.seek(0)
    content = file.read()
    # Of a truncated file OpenCV gives what there is; Pillow refuses it.
    if not content.endswith(END_OF_JPEG):
        return None
    flags = DECODED_AT[reduction] | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        pixels = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    except cv2.error:
        return None
    width, height = stored.size
    expected = (height // reduction, width // reduction)
    return pixels if pixels is not None and pixels.shape[:2] == expected else None


def _orientation(stored: Image.Image) -> int:
    try:
        return stored.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # a damaged one, of any kind; then there is none, as for Detectron2
        return 1
