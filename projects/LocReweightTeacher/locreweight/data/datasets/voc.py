"""Folders in Pascal VOC's layout."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from xml.etree import ElementTree

from detectron2.structures import BoxMode

from ...errors import UsageError
from .file_names import check_inside, printable_name

logger = logging.getLogger(__name__)


def load_voc(
    folder: str, split: str, class_names: list[str], *, allow_outside: bool = False
) -> list[dict]:
    """Records of a folder in Pascal VOC's layout.

    Unlike Detectron2's reader, objects marked difficult are kept apart: as ``iscrowd`` they are
    left out of training and ignored in evaluation.

    Args:
        folder: with ``Annotations``, ``ImageSets/Main/<split>.txt``, ``JPEGImages``.
        split: which list of images.
        class_names: in the order of the model's classes.
        allow_outside: the list may name files outside of these folders.

    Raises:
        UsageError: for a missing or broken annotation, a class that is not in ``class_names``, or
            an image that is listed twice.
    """
    return _records(folder, _listed(folder, split, allow_outside), class_names)


def load_unlabeled_voc(
    folder: str, split: str, class_names: list[str], *, allow_outside: bool = False
) -> list[dict]:
    """The same of images to learn from without labels, which need no annotations.

    Those that are there can only say how good pseudo-labels are. Unless all of them can be read,
    and their classes are known, records have nothing but ``file_name`` and ``image_id``.

    Raises:
        UsageError: for a list that cannot be used.
    """
    ids = _listed(folder, split, allow_outside)
    try:
        return _records(folder, ids, class_names)
    except UsageError as error:
        logger.info("the annotations of unlabeled images are not used: %s", error)
        return [{"file_name": _image(Path(folder), i), "image_id": i} for i in ids]


def _listed(folder: str, split: str, allow_outside: bool) -> list[str]:
    """The names of a split's images."""
    listed = Path(folder) / "ImageSets" / "Main" / f"{split}.txt"
    try:
        lines = listed.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"{listed} is no list of images: {error}") from error
    # A list of one class says behind each name whether the image shows it.
    ids = [re.sub(r"\s+-?[01]$", "", line.strip()) for line in lines if line.strip()]
    for image_id in ids:
        check_inside(image_id, str(listed), folder, allow_outside=allow_outside)
    if len(set(ids)) < len(ids):
        repeated = next(image_id for image_id in ids if ids.count(image_id) > 1)
        raise UsageError(f"{listed} lists {printable_name(repeated)} more than once")
    return ids


def _records(folder: str, ids: list[str], class_names: list[str]) -> list[dict]:
    index = {name: i for i, name in enumerate(class_names)}
    return [_record(Path(folder), image_id, index) for image_id in ids]


def _image(folder: Path, image_id: str) -> str:
    return str(folder / "JPEGImages" / f"{image_id}.jpg")


def _record(folder: Path, image_id: str, class_index: dict[str, int]) -> dict:
    file = folder / "Annotations" / f"{image_id}.xml"
    try:
        root = ElementTree.parse(file).getroot()
        width, height = (int(_text(root, f"size/{side}")) for side in ("width", "height"))
        if min(width, height) < 1:
            raise ValueError(f"it says that its image has {width} x {height} pixels")
        return {
            "file_name": _image(folder, image_id),
            "image_id": image_id,
            "height": height,
            "width": width,
            "annotations": [_object(node, class_index) for node in root.findall("object")],
        }
    except OSError as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else error.strerror
        raise UsageError(f"the annotation {printable_name(str(file))} {reason}") from error
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # LookupError: the encoding
        raise UsageError(
            f"the annotation {printable_name(str(file))} is broken: {error}"
        ) from error


def _object(node: ElementTree.Element, class_index: dict[str, int]) -> dict:
    name = _text(node, "name")
    if name not in class_index:
        raise ValueError(
            f"class {name!r} is none of {list(class_index)}; set DATASETS.CLASS_NAMES to the names "
            "that the annotations use and MODEL.ROI_HEADS.NUM_CLASSES to their number"
        )
    corners = ("xmin", "ymin", "xmax", "ymax")
    x1, y1, x2, y2 = (float(_text(node, f"bndbox/{corner}")) for corner in corners)
    # Corners are pixels counted from 1, and both belong to the box. Where they coincide that would
    # make an object of one pixel's width; it is a slip, so the box is kept as one without area.
    return {
        "category_id": class_index[name],
        "bbox": [x1 - (x2 != x1), y1 - (y2 != y1), x2, y2],
        "bbox_mode": BoxMode.XYXY_ABS,
        "iscrowd": int(node.findtext("difficult", "0") == "1"),
    }


def _text(node: ElementTree.Element, path: str) -> str:
    text = node.findtext(path)
    if text is None:
        raise ValueError(f"it has no <{path}>")
    return text.strip()
