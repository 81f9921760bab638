"""Every image that training or evaluation cannot do without is read once before they start."""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor

from detectron2.data.detection_utils import SizeMismatchError, check_image_size
from detectron2.utils import comm
from tqdm import tqdm

from ..errors import UsageError
from .checks import some
from .file_names import shown
from .images import UnreadableImage, one_line, read_rgb

logger = logging.getLogger(__name__)


def check_images_exist(records: list[dict]) -> None:
    """Every image file is there.

    Raises:
        UsageError: names some that are not.
    """
    missing = [shown(r["file_name"]) for r in records if not os.path.isfile(r["file_name"])]
    if missing:
        raise UsageError(f"{len(missing)} of {len(records)} images are missing: {some(missing)}")


def check_images_decode(records: list[dict]) -> None:
    """Every image decodes, and has the width and height that its record says.

    To be called on all processes: one of each machine reads the images, in threads, since the
    decoders run in parallel; all learn the result.

    Args:
        records: with ``file_name``, and ``width`` and ``height`` in pixels after the rotation that
            the image's EXIF asks for.

    Raises:
        UsageError: names some that do not.
    """
    faults = _faults(records) if comm.get_local_rank() == 0 else []
    comm.synchronize()  # with the run's --timeout, which what is gathered over on GPUs has not
    # Machines may not share a disk; the first with a fault speaks.
    faults = next((found for found in comm.all_gather(faults) if found), [])
    if faults:
        raise UsageError(
            f"{len(faults)} of {len(records)} annotated images cannot be used: {some(faults)}. "
            "Repair them or take them out of the annotations"
        )


def _faults(records: list[dict]) -> list[str]:
    logger.info(
        "reading %d annotated images to see that they are in order; "
        "DATASETS.CHECK_IMAGES False leaves this out",
        len(records),
    )
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        # The bar appears when it takes longer than some seconds, and on terminals alone.
        found = tqdm(
            threads.map(_fault, records),
            desc="checking images",
            total=len(records),
            delay=3,
            disable=None,
        )
        return [fault for fault in found if fault]


def _fault(record: dict) -> str:
    """What is wrong with an image, or nothing."""
    try:
        pixels = read_rgb(record["file_name"])
        check_image_size(record, pixels)
    except UnreadableImage as error:
        return f"{shown(record['file_name'])} ({one_line(error.__cause__ or error)})"
    except SizeMismatchError:
        height, width = pixels.shape[:2]
        return (
            f"{shown(record['file_name'])} is {width} x {height} pixels (as its EXIF rotates it), "
            f"its annotation says {record.get('width')} x {record.get('height')}"
        )
    return ""
