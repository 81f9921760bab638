"""Image files: which are read, and how they become RGB."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from detectron2.data.detection_utils import _apply_exif_orientation, convert_PIL_to_numpy
from detectron2.utils.file_io import PathManager
from PIL import Image

from ..errors import UsageError
from .file_names import shown

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
    with opened(file_name) as (_, stored):
        return pixels_of(stored)


@contextlib.contextmanager
def opened(file_name: str) -> Iterator[tuple[BinaryIO, Image.Image]]:
    """An image file and what Pillow knows before it decodes it.

    Raises:
        UnreadableImage: names the file, also for whatever goes wrong while it is open.
    """
    with naming(file_name, OSError):
        # Opening a pipe would never end. What is not there at all may be an address.
        if os.path.exists(file_name) and not os.path.isfile(file_name):
            raise OSError("it is no file, but a folder, a pipe or a device")
    # Whatever a damaged file makes the decoder raise.
    with naming(file_name, Exception), PathManager.open(file_name, "rb") as file:
        yield file, Image.open(file, formats=FORMATS)


def pixels_of(stored: Image.Image) -> np.ndarray:
    """Decodes an opened image file: :func:`read_rgb` says how."""
    image: Image.Image = _apply_exif_orientation(stored)
    if _has_sixteen_bits(stored):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif stored.mode in ("I", "F"):
        raise ValueError("with 32 bits for a pixel it is not known how bright white is")
    return convert_PIL_to_numpy(image, "RGB")


@contextlib.contextmanager
def naming(file_name: str, *errors: type[Exception]) -> Iterator[None]:
    """Turns errors into :class:`UnreadableImage`, which names the file."""
    try:
        yield
    except UnreadableImage:
        raise
    except errors as error:
        raise UnreadableImage(
            f"cannot read or augment the image {shown(file_name)}: {one_line(error)}. "
            "If the file is damaged, repair or remove it"
        ) from error


def one_line(error: BaseException) -> str:
    """An error for a message, which may quote the name of a file."""
    return shown(" ".join(f"{type(error).__name__}: {error}".split()))


def _has_sixteen_bits(image: Image.Image) -> bool:
    # Formats without 32 bits that Pillow nevertheless may hold in as many.
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
