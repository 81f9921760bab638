"""Checks of annotations and images that run before training and evaluation start."""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
from detectron2.config import CfgNode
from detectron2.data.detection_utils import SizeMismatchError, check_image_size
from detectron2.structures import BoxMode
from detectron2.utils import comm
from tqdm import tqdm

from ..errors import UsageError
from .datasets.file_names import describe_missing, printable_name
from .datasets.packed_records import ImageFiles
from .datasets.real_paths import RealPathCache
from .image_io import UnreadableImage, read_rgb, single_line

logger = logging.getLogger(__name__)

_MAX_EXAMPLES = 5  # in a message
_CHECKED_TOGETHER = 1000  # images


def first_few(items: Sequence[str]) -> str:
    """The first items of a list, for messages."""
    return ", ".join(items[:_MAX_EXAMPLES]) + (", ..." if len(items) > _MAX_EXAMPLES else "")


# -- boxes -----------------------------------------------------------------------------------------


def check_boxes(records: Iterable[dict], *, drop_bad: bool) -> list[dict]:
    """Check boxes and leave out those that cannot be trained on.

    Boxes without area or outside of their image are left out with a warning. Boxes that are not
    four numbers, NaN, infinite or inverted are errors, because they mean that the annotations are
    not what they seem.

    Args:
        records: in Detectron2's standard format, boxes in absolute pixels of the original image.
        drop_bad: leave NaN, infinite and inverted boxes out as well instead of raising.

    Returns:
        copies of the records without the boxes that were left out.

    Raises:
        UsageError: names images with such boxes.
    """
    faults: dict[str, list[str]] = {"empty": [], "outside": [], "bad": []}
    checked = []
    for record, is_sound in _with_soundness(records):
        if is_sound:
            checked.append(record | {"annotations": list(record.get("annotations", []))})
            continue
        kept = []
        for annotation in record.get("annotations", []):
            fault = _box_fault(annotation, record)
            if fault is None:
                kept.append(annotation)
            else:
                faults[fault].append(_describe_box(annotation, record))
        checked.append(record | {"annotations": kept})
    if faults["bad"] and not drop_bad:
        raise UsageError(
            f"{len(faults['bad'])} boxes are malformed, NaN, infinite or inverted: "
            f"{first_few(faults['bad'])}. Repair them, or leave them out with "
            "DATASETS.CHECKS.DROP_BAD_BOXES True"
        )
    for fault, description in (
        ("empty", "have no area"),
        ("outside", "lie outside of their image"),
        ("bad", "are malformed, NaN, infinite or inverted"),
    ):
        if faults[fault]:
            logger.warning(
                "left out %d boxes that %s: %s",
                len(faults[fault]),
                description,
                first_few(faults[fault]),
            )
    return checked


def check_test_set(name: str, records: Sequence[dict]) -> None:
    """Check that a test set can be evaluated on.

    Raises:
        UsageError: if it has no box that counts, or a box that is not four numbers, NaN, infinite
            or inverted.
    """
    counts = count_boxes(records)
    if not counts.boxes:
        raise UsageError(f"{name} has no annotated box, so it cannot be used in DATASETS.TEST")
    bad = [
        _describe_box(annotation, record)
        for record, is_sound in _with_soundness(records)
        if not is_sound
        for annotation in record.get("annotations", [])
        if _box_fault(annotation, record) == "bad"
    ]
    if bad:
        raise UsageError(
            f"{len(bad)} boxes of the test set {name} are malformed, NaN, infinite or inverted: "
            f"{first_few(bad)}. Repair or remove them"
        )
    if counts.crowds == counts.boxes:
        raise UsageError(
            f"all {counts.boxes} boxes of the test set {name} are crowds (iscrowd 1 in COCO, "
            f"difficult 1 in Pascal VOC), such as {counts.example}. Evaluation ignores crowds, so "
            "there is nothing to evaluate on: set iscrowd or difficult to 0 for single objects, or "
            "use another set in DATASETS.TEST"
        )
    if not any(True for record in records for _ in countable_boxes(record)):
        raise UsageError(
            f"all {counts.boxes - counts.crowds} boxes of the test set {name} have no area or lie "
            "outside of their image, so there is nothing to evaluate on. Check the unit and the "
            "format of the boxes"
        )


def countable_boxes(record: dict) -> Iterator[dict]:
    """The annotations of a test image that a detector can find: boxes with area, no crowds."""
    for annotation in record.get("annotations", []):
        if not annotation.get("iscrowd", 0) and _box_fault(annotation, record) is None:
            yield annotation


@dataclass(frozen=True)
class BoxCounts:
    """Numbers of boxes of a data set.

    Attributes:
        boxes: all boxes.
        crowds: boxes with ``iscrowd`` 1, which VOC's difficult objects have as well.
        example: a crowd and its image; empty if there is none.
    """

    boxes: int
    crowds: int
    example: str


def count_boxes(records: Iterable[dict]) -> BoxCounts:
    """Count the boxes of a data set and those that are left out as crowds."""
    boxes, crowds, example = 0, 0, ""
    for record in records:
        for annotation in record.get("annotations", []):
            boxes += 1
            if annotation.get("iscrowd", 0):
                crowds += 1
                example = example or _describe_box(annotation, record)
    return BoxCounts(boxes, crowds, example)


def describe_crowds(name: str, records: Iterable[dict], consequence: str) -> str:
    """How many boxes of a data set are left out as crowds; empty if there are none."""
    counts = count_boxes(records)
    if not counts.crowds:
        return ""
    return (
        f"{counts.crowds} of {counts.boxes} boxes of {name} are crowds (iscrowd 1 in COCO, "
        f"difficult 1 in Pascal VOC), such as {counts.example}. {consequence}"
    )


def _describe_box(annotation: dict, record: dict) -> str:
    return f"{printable_name(record['file_name'])}: {str(annotation.get('bbox'))[:100]}"


def _with_soundness(records: Iterable[dict]) -> Iterator[tuple[dict, bool]]:
    """Pair each record with whether all its boxes certainly have no fault.

    Many boxes are checked together, in a fraction of the time of :func:`_box_fault`, which decides
    about the others.
    """
    remaining = iter(records)
    while chunk := list(islice(remaining, _CHECKED_TOGETHER)):
        yield from zip(chunk, _are_sound(chunk), strict=True)


def _are_sound(records: list[dict]) -> list[bool]:
    annotations = [record.get("annotations", []) for record in records]
    boxes = [a.get("bbox") for of_image in annotations for a in of_image]
    modes = {a.get("bbox_mode") for of_image in annotations for a in of_image}
    if not boxes:
        return [True] * len(records)
    is_plain = set(map(type, boxes)) == {list} and set(map(len, boxes)) == {4}
    if not is_plain or not {*map(type, chain.from_iterable(boxes))} <= {int, float}:
        return [False] * len(records)
    if modes not in ({BoxMode.XYWH_ABS}, {BoxMode.XYXY_ABS}):
        return [False] * len(records)
    is_xywh = modes == {BoxMode.XYWH_ABS}
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            # The same precision as in _corners.
            corners = np.array(boxes, np.float32 if is_xywh else np.float64)
            if is_xywh:
                corners[:, 2:] += corners[:, :2]
    except OverflowError:  # an integer beyond floats
        return [False] * len(records)
    counts = list(map(len, annotations))
    sizes = [(r.get("width", math.inf), r.get("height", math.inf)) for r in records]
    limits = np.repeat(np.array(sizes, np.float64), counts, axis=0)
    low, high = corners[:, :2], corners[:, 2:]
    is_good = np.isfinite(corners).all(axis=1)
    is_good &= ((low < high) & (low < limits) & (high > 0)).all(axis=1)
    faulty_in_image = np.bincount(
        np.repeat(np.arange(len(records)), counts)[~is_good], minlength=len(records)
    )
    return (faulty_in_image == 0).tolist()


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
        # Equal to Detectron2's conversion, which takes a minute for the boxes of COCO.
        with np.errstate(over="ignore", invalid="ignore"):
            x, y, width, height = np.array(box, np.float32)
            return x, y, x + width, y + height
    return BoxMode.convert(box, mode, BoxMode.XYXY_ABS)


# -- classes ---------------------------------------------------------------------------------------


def with_configured_names(cfg: CfgNode, class_names: dict[str, list[str]]) -> dict[str, list[str]]:
    """Add ``DATASETS.CLASS_NAMES`` to the class names to compare, unless it is empty.

    COCO and yaml files list their classes, so a name that is spelled differently in
    ``DATASETS.CLASS_NAMES`` has no other effect.

    Args:
        cfg: the config.
        class_names: data set -> its class names in order.
    """
    configured = list(cfg.DATASETS.CLASS_NAMES)
    return {"DATASETS.CLASS_NAMES": configured} | class_names if configured else class_names


def check_classes(class_names: dict[str, list[str]], num_classes: int) -> None:
    """Check that all annotated data sets have the same classes, as many as the model.

    The data sets are compared with each other first: as long as they differ, no number of classes
    fits all of them.

    Args:
        class_names: data set -> its class names in order.
        num_classes: ``MODEL.ROI_HEADS.NUM_CLASSES``.

    Raises:
        UsageError: names the data sets and the classes.
    """
    for dataset, names in class_names.items():
        repeated = [name for name, count in Counter(names).items() if count > 1]
        if repeated:
            raise UsageError(f"{dataset} has classes of the same name: {first_few(repeated)}")
    check_same_classes(class_names)
    for dataset, names in class_names.items():
        if len(names) != num_classes:
            raise UsageError(
                f"{dataset} has {len(names)} classes {first_few(names)}, the model has "
                f"{num_classes}; set MODEL.ROI_HEADS.NUM_CLASSES {len(names)}"
            )


def check_same_classes(class_names: dict[str, list[str]]) -> None:
    """Check that data sets have the same classes in the same order.

    Raises:
        UsageError: says which classes are missing in which data set.
    """
    lists = list(class_names.values())
    if all(names == lists[0] for names in lists):
        return
    every = list(dict.fromkeys(name for names in lists for name in names))
    lines = []
    for dataset, names in class_names.items():
        missing = [name for name in every if name not in names]
        lacks = f"; it lacks {_quoted(missing)}" if missing else ""
        lines.append(f"{dataset}: {_quoted(names)}{lacks}")
    problem = (
        "the data sets do not have the same classes. All of them need the same list of classes, "
        "also of classes without a box: add the missing categories, set DATASETS.CLASS_NAMES for "
        "formats without a list of classes (or leave it empty), or correct names that are spelled "
        "differently"
    )
    if all(set(names) == set(every) for names in lists):
        problem = (
            "the data sets have the same classes in a different order. Use the same order (COCO: "
            "of the category ids) in all of them; DATASETS.CLASS_NAMES sets that of formats "
            "without a list of classes"
        )
    raise UsageError(f"{problem}.\n  " + "\n  ".join(lines))


def _quoted(names: Sequence[str]) -> str:
    return first_few([repr(name) for name in names])


# -- images in several data sets -------------------------------------------------------------------


def common_images(
    records: Iterable[dict], images: ImageFiles, real_paths: RealPathCache
) -> list[int]:
    """Indices of the images that are also among the records.

    Args:
        records: records with ``file_name``; images are the same if their real paths are.
        images: the images to search.
        real_paths: cache, shared between calls.
    """
    if not images:
        return []
    return real_paths.find({real_paths(record["file_name"]) for record in records}, images)


def without_overlap(
    labeled: Iterable[dict], unlabeled: ImageFiles, real_paths: RealPathCache, *, exclude: bool
) -> ImageFiles:
    """Return the unlabeled images, none of which may be a labeled image.

    Args:
        labeled, unlabeled, real_paths: see :func:`common_images`.
        exclude: leave common images out instead of raising.

    Raises:
        UsageError: names some of the common images.
    """
    common = common_images(labeled, unlabeled, real_paths)
    if not common:
        return unlabeled
    if not exclude:
        names = [printable_name(unlabeled[i]["file_name"]) for i in common]
        raise UsageError(
            f"{len(common)} unlabeled images are also labeled images: {first_few(names)}. Remove "
            "them from the unlabeled data, or leave them out with DATASETS.EXCLUDE_LABELED True"
        )
    logger.info("left out %d unlabeled images that are labeled images", len(common))
    return unlabeled.without(common)


def without_repeats(unlabeled: ImageFiles, real_paths: RealPathCache) -> ImageFiles:
    """Return the unlabeled images with each file only once, in the same order."""
    repeats = real_paths.find_repeats(unlabeled)
    if not repeats:
        return unlabeled
    logger.info(
        "left out %d repeated entries of unlabeled images, such as %s",
        len(repeats),
        printable_name(unlabeled[repeats[0]]["file_name"]),
    )
    return unlabeled.without(repeats)


def warn_of_repeated_images(name: str, records: Iterable[dict]) -> None:
    """Warn if several records have the same image file.

    Args:
        name: what the records are, for the message.
        records: with ``file_name``, which is compared as it is.
    """
    counts = Counter(record["file_name"] for record in records)
    repeated = [file for file, count in counts.items() if count > 1]
    if repeated:
        logger.warning(
            "%s lists images more than once (%d), such as %s. Training and evaluation count each "
            "entry: give each image a single entry with all its boxes",
            name,
            len(repeated),
            printable_name(repeated[0]),
        )


# -- image files -----------------------------------------------------------------------------------


def check_images_exist(records: list[dict]) -> None:
    """Check that every image file exists.

    Raises:
        UsageError: names some missing images.
    """
    missing = [r["file_name"] for r in records if not os.path.isfile(r["file_name"])]
    if missing:
        raise UsageError(
            f"{len(missing)} of {len(records)} images are missing: "
            f"{first_few([describe_missing(file) for file in missing[: _MAX_EXAMPLES + 1]])}"
        )


def check_images_decode(records: list[dict]) -> None:
    """Check that every image can be decoded and has the annotated width and height.

    Must be called on all processes. One process per machine reads the images, in threads.

    Args:
        records: with ``file_name``, and ``width`` and ``height`` in pixels after EXIF rotation.

    Raises:
        UsageError: names some images that cannot be used, on all processes.
    """
    problems = _image_problems(records) if comm.get_local_rank() == 0 else []
    comm.synchronize()  # honors --timeout, which the group that all_gather uses on GPUs does not
    # Machines may have their own disks; report the first machine that found a problem.
    problems = next((found for found in comm.all_gather(problems) if found), [])
    if problems:
        raise UsageError(
            f"{len(problems)} of {len(records)} annotated images cannot be used: "
            f"{first_few(problems)}. Repair them or remove them from the annotations"
        )


def _image_problems(records: list[dict]) -> list[str]:
    logger.info(
        "checking %d annotated images; DATASETS.CHECKS.DECODE_IMAGES False skips this", len(records)
    )
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        # The progress bar appears on terminals only, if the check takes more than a few seconds.
        problems = tqdm(
            threads.map(_image_problem, records),
            desc="checking images",
            total=len(records),
            delay=3,
            disable=None,
        )
        return [problem for problem in problems if problem]


def _image_problem(record: dict) -> str:
    """Why an image cannot be used; empty if it can."""
    name = printable_name(record["file_name"])
    try:
        pixels = read_rgb(record["file_name"])
        check_image_size(record, pixels)
    except UnreadableImage as error:
        return f"{name} ({single_line(error.__cause__ or error)})"
    except SizeMismatchError:
        height, width = pixels.shape[:2]
        return (
            f"{name} is {width} x {height} pixels after EXIF rotation, its annotation says "
            f"{record.get('width')} x {record.get('height')}"
        )
    return ""
