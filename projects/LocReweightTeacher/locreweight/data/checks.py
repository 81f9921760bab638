"""What is wrong with annotations, found before training and not in the middle of it."""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
from detectron2.data.detection_utils import SizeMismatchError, check_image_size
from detectron2.structures import BoxMode
from detectron2.utils import comm
from tqdm import tqdm

from ..errors import UsageError
from .datasets.file_names import printable_name
from .datasets.image_folders import ImageFiles
from .image_io import UnreadableImage, read_rgb, single_line

logger = logging.getLogger(__name__)

_SHOWN = 5  # of many faults alike, how many a message names


def check_boxes(records: list[dict], *, drop_bad: bool) -> list[dict]:
    """Records whose boxes can be trained on.

    Boxes without area or wholly outside of their image teach nothing and are left out, with a
    warning. Boxes that are not four numbers, NaN, infinite or inverted say that the annotations
    are not what they seem.

    Args:
        records: in Detectron2's standard format, boxes in absolute pixels of the original image.
        drop_bad: leave NaN, infinite and inverted boxes out too, and do not raise.

    Raises:
        UsageError: names the images with such boxes.
    """
    faults: dict[str, list[str]] = {"empty": [], "outside": [], "bad": []}
    checked = []
    for record in records:
        kept = []
        for annotation in record.get("annotations", []):
            fault = _box_fault(annotation, record)
            if fault is None:
                kept.append(annotation)
            else:
                faults[fault].append(_where(annotation, record))
        checked.append(record | {"annotations": kept})
    if faults["bad"] and not drop_bad:
        raise UsageError(
            f"{len(faults['bad'])} boxes are malformed, NaN, infinite or inverted: "
            f"{first_few(faults['bad'])}. Repair them, or leave them out with "
            "DATASETS.CHECKS.DROP_BAD_BOXES True"
        )
    for fault, words in (
        ("empty", "have no area"),
        ("outside", "lie outside of their image"),
        ("bad", "are malformed, NaN, infinite or inverted"),
    ):
        if faults[fault]:
            logger.warning(
                "left out %d boxes that %s: %s", len(faults[fault]), words, first_few(faults[fault])
            )
    return checked


def check_test_set(name: str, records: list[dict]) -> None:
    """A test set can be evaluated on, which would else be found out hours into a run.

    Raises:
        UsageError: if it has no box, or one that is not four numbers, NaN, infinite or inverted.
    """
    if not any(record.get("annotations") for record in records):
        raise UsageError(f"{name} has no annotated box: it cannot be in DATASETS.TEST")
    bad = [
        _where(annotation, record)
        for record in records
        for annotation in record.get("annotations", [])
        if _box_fault(annotation, record) == "bad"
    ]
    if bad:
        raise UsageError(
            f"{len(bad)} boxes of the test set {name} are malformed, NaN, infinite or inverted: "
            f"{first_few(bad)}. Repair or remove them"
        )


def check_classes(class_names: dict[str, list[str]], num_classes: int) -> None:
    """All annotated data sets have the model's number of classes, under the same names.

    Args:
        class_names: data set -> its class names in order.
        num_classes: ``MODEL.ROI_HEADS.NUM_CLASSES``.

    Raises:
        UsageError: names the data set and the classes.
    """
    for dataset, names in class_names.items():
        if len(names) != num_classes:
            raise UsageError(
                f"{dataset} has {len(names)} classes {first_few(names)}, the model {num_classes}; set "
                f"MODEL.ROI_HEADS.NUM_CLASSES {len(names)}"
            )
        repeated = [name for name, count in Counter(names).items() if count > 1]
        if repeated:
            raise UsageError(f"{dataset} names these classes more than once: {first_few(repeated)}")
    for (first, names), (other, other_names) in zip(
        list(class_names.items())[:-1], list(class_names.items())[1:], strict=True
    ):
        if names != other_names:
            raise UsageError(
                f"{first} and {other} do not name the same classes in the same order: "
                f"{first_few(names)} and {first_few(other_names)}"
            )


def common_images(records: Iterable[dict], images: ImageFiles, real_paths: RealPaths) -> list[int]:
    """Which of the images are among the records.

    Args:
        records: images are the same if their files are, whatever links lead to them.
        images: what is looked through.
        real_paths: remembers the folders; the same one for several calls.
    """
    known = {real_paths(record["file_name"]) for record in records}
    return real_paths.among(known, images)


def without_overlap(
    labeled: Iterable[dict], unlabeled: ImageFiles, real_paths: RealPaths, *, exclude: bool
) -> ImageFiles:
    """The unlabeled images, none of which is one of the labeled ones.

    Args:
        labeled, unlabeled, real_paths: as of :func:`common_images`.
        exclude: leave common images out, and do not raise.

    Raises:
        UsageError: names some of the common images.
    """
    common = common_images(labeled, unlabeled, real_paths)
    if not common:
        return unlabeled
    if not exclude:
        names = [printable_name(unlabeled[i]["file_name"]) for i in common]
        raise UsageError(
            f"{len(common)} unlabeled images are labeled as well: {first_few(names)}. Take them "
            "out of the unlabeled set, or leave them out with DATASETS.EXCLUDE_LABELED True"
        )
    logger.info("left out %d unlabeled images that are annotated", len(common))
    return unlabeled.without(common)


def _where(annotation: dict, record: dict) -> str:
    return f"{printable_name(record['file_name'])}: {str(annotation.get('bbox'))[:100]}"


def _box_fault(annotation: dict, record: dict) -> str | None:
    try:
        x1, y1, x2, y2 = _corners(list(annotation["bbox"]), annotation["bbox_mode"])
        finite = all(math.isfinite(value) for value in (x1, y1, x2, y2))
    except (KeyError, TypeError, ValueError, RuntimeError, AssertionError, OverflowError):
        return "bad"  # not four numbers
    if not finite or x2 < x1 or y2 < y1:
        return "bad"
    if x2 == x1 or y2 == y1:
        return "empty"
    width, height = record.get("width", math.inf), record.get("height", math.inf)
    return "outside" if x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0 else None


def _corners(box: list, mode: BoxMode) -> Sequence[float]:
    if mode == BoxMode.XYWH_ABS and len(box) == 4 and {*map(type, box)} <= {int, float}:
        # What Detectron2 does with tensors, which for the million boxes of COCO takes a minute.
        with np.errstate(over="ignore"):
            x, y, width, height = np.array(box, np.float32)
            return x, y, x + width, y + height
    return BoxMode.convert(box, mode, BoxMode.XYXY_ABS)


def first_few(faults: list[str]) -> str:
    """The first few of them, in words."""
    return ", ".join(faults[:_SHOWN]) + (", ..." if len(faults) > _SHOWN else "")


# --------------------------------------------------------------------------------------------------
# Every image that training or evaluation cannot do without is read once before they start.


def check_images_exist(records: list[dict]) -> None:
    """Every image file is there.

    Raises:
        UsageError: names some that are not.
    """
    missing = [
        printable_name(r["file_name"]) for r in records if not os.path.isfile(r["file_name"])
    ]
    if missing:
        raise UsageError(
            f"{len(missing)} of {len(records)} images are missing: {first_few(missing)}"
        )


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
            f"{len(faults)} of {len(records)} annotated images cannot be used: {first_few(faults)}. "
            "Repair them or take them out of the annotations"
        )


def _faults(records: list[dict]) -> list[str]:
    logger.info(
        "reading %d annotated images to see that they are in order; "
        "DATASETS.CHECKS.DECODE_IMAGES False leaves this out",
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
        return f"{printable_name(record['file_name'])} ({single_line(error.__cause__ or error)})"
    except SizeMismatchError:
        height, width = pixels.shape[:2]
        return (
            f"{printable_name(record['file_name'])} is {width} x {height} pixels (as its EXIF rotates it), "
            f"its annotation says {record.get('width')} x {record.get('height')}"
        )
    return ""


# --------------------------------------------------------------------------------------------------
# Which images are the same file, found without asking the disk for every single one.


class RealPaths:
    """``os.path.realpath`` for many files of the same folders.

    Each folder is resolved once, and listed once to know the links in it. What was seen is
    remembered: one is made for each time of looking.
    """

    def __init__(self) -> None:
        self._real_folder = cache(os.path.realpath)
        self._links = cache(_links)

    def __call__(self, path: str) -> str:
        """The path without links; of one that leads nowhere, as far as it leads."""
        folder, name = self._place(path)
        if not self._leads_on(folder, name):
            return os.path.join(folder, name)
        try:
            target = os.readlink(os.path.join(folder, name))
        except OSError:  # no link, or none any more
            return os.path.realpath(path)
        place = self._place(os.path.join(folder, target))
        # Links to links are rare, and may lead in circles.
        return os.path.realpath(path) if self._leads_on(*place) else os.path.join(*place)

    def among(self, known: set[str], images: ImageFiles) -> list[int]:
        """Which images are files that are known, by their real paths."""
        homes = {os.path.dirname(path) for path in known}
        # No file of a folder without links and without known files can be one.
        suspects = [self._may_hold(folder, homes) for folder in images.folders]
        return [i for i in images.in_folders(suspects) if self(images[i]["file_name"]) in known]

    def _may_hold(self, folder: str, homes: set[str]) -> bool:
        real, _ = self._place(folder)
        return real in homes or self._links(real) != frozenset()

    def _place(self, path: str) -> tuple[str, str]:
        folder, slash, name = path.rpartition("/")
        return self._real_folder(folder or slash or "."), name

    def _leads_on(self, folder: str, name: str) -> bool:
        if name in ("", ".", ".."):
            return True
        links = self._links(folder)
        return os.path.islink(os.path.join(folder, name)) if links is None else name in links


def _links(folder: str) -> frozenset[str] | None:
    """Names of the symbolic links in a folder; unknown if it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries if entry.is_symlink())
    except FileNotFoundError:
        return frozenset()
    except OSError:  # one may open files of a folder that one may not list
        return None
