"""What is wrong with annotations, found before training and not in the middle of it."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from detectron2.structures import BoxMode

from ..errors import UsageError
from .file_names import shown
from .image_files import ImageFiles
from .same_files import RealPaths

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
            f"{some(faults['bad'])}. Repair them, or leave them out with "
            "DATASETS.DROP_BAD_BOXES True"
        )
    for fault, words in (
        ("empty", "have no area"),
        ("outside", "lie outside of their image"),
        ("bad", "are malformed, NaN, infinite or inverted"),
    ):
        if faults[fault]:
            logger.warning(
                "left out %d boxes that %s: %s", len(faults[fault]), words, some(faults[fault])
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
            f"{some(bad)}. Repair or remove them"
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
                f"{dataset} has {len(names)} classes {some(names)}, the model {num_classes}; set "
                f"MODEL.ROI_HEADS.NUM_CLASSES {len(names)}"
            )
        repeated = [name for name, count in Counter(names).items() if count > 1]
        if repeated:
            raise UsageError(f"{dataset} names these classes more than once: {some(repeated)}")
    for (first, names), (other, other_names) in zip(
        list(class_names.items())[:-1], list(class_names.items())[1:], strict=True
    ):
        if names != other_names:
            raise UsageError(
                f"{first} and {other} do not name the same classes in the same order: "
                f"{some(names)} and {some(other_names)}"
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
        names = [shown(unlabeled[i]["file_name"]) for i in common]
        raise UsageError(
            f"{len(common)} unlabeled images are labeled as well: {some(names)}. Take them "
            "out of the unlabeled set, or leave them out with DATASETS.EXCLUDE_LABELED True"
        )
    logger.info("left out %d unlabeled images that are annotated", len(common))
    return unlabeled.without(common)


def _where(annotation: dict, record: dict) -> str:
    return f"{shown(record['file_name'])}: {str(annotation.get('bbox'))[:100]}"


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


def some(faults: list[str]) -> str:
    """The first few of them, in words."""
    return ", ".join(faults[:_SHOWN]) + (", ..." if len(faults) > _SHOWN else "")
