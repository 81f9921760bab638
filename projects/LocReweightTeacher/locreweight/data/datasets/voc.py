"""Reader of folders in Pascal VOC's layout."""

from __future__ import annotations

import logging
import re
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from detectron2.structures import BoxMode

from ...errors import UsageError
from .file_names import check_inside, printable_name

logger = logging.getLogger(__name__)


def load_voc(
    folder: str, split: str, class_names: list[str], *, allow_outside: bool = False
) -> list[dict]:
    """Read the annotated images of a split.

    Objects marked as difficult become ``iscrowd`` annotations, which are left out of training and
    ignored in evaluation. Detectron2's reader does not tell them from other objects.

    Args:
        folder: with ``Annotations``, ``JPEGImages`` and ``ImageSets/Main/<split>.txt``.
        split: name of the list of images.
        class_names: in the order of the model's classes.
        allow_outside: the list may name files outside of the folder.

    Returns:
        records in Detectron2's standard format. Boxes are xyxy in absolute pixels of the original
        image, where the first pixel covers [0, 1].

    Raises:
        UsageError: for a missing or malformed annotation, a class that is not in ``class_names``,
            or an image that is listed twice.
    """
    return _read_records(folder, read_split(folder, split, allow_outside), class_names)


def load_unlabeled_voc(
    folder: str, split: str, class_names: list[str], *, allow_outside: bool = False
) -> list[dict]:
    """Read the images of a split to train on without labels; annotations are optional.

    Annotations serve only to measure pseudo-labels. If one is missing or has an unknown class, all
    records have only ``file_name`` and ``image_id``.

    Args:
        folder, split, class_names, allow_outside: as for :func:`load_voc`.

    Raises:
        UsageError: if the list of images cannot be used.
    """
    image_ids = read_split(folder, split, allow_outside)
    try:
        return _read_records(folder, image_ids, class_names)
    except UsageError as error:
        logger.info("the annotations of unlabeled images are not used: %s", error)
        return [{"file_name": _image_file(Path(folder), i), "image_id": i} for i in image_ids]


def split_file(folder: str, split: str) -> str:
    """Path of the list of a split's images."""
    return str(Path(folder) / "ImageSets" / "Main" / f"{split}.txt")


def read_split(folder: str, split: str, allow_outside: bool) -> list[str]:
    """Read the image ids of a split.

    Raises:
        UsageError: if the list is no text, or lists an image twice.
    """
    file = split_file(folder, split)
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is no list of images: {error}") from error
    # The list of a class has a flag behind each name: whether the image shows the class.
    image_ids = [re.sub(r"\s+-?[01]$", "", line.strip()) for line in lines if line.strip()]
    for image_id in image_ids:
        check_inside(image_id, file, folder, allow_outside=allow_outside)
    repeated = [image_id for image_id, count in Counter(image_ids).items() if count > 1]
    if repeated:
        raise UsageError(f"{file} lists {printable_name(repeated[0])} more than once")
    return image_ids


def _read_records(folder: str, image_ids: list[str], class_names: list[str]) -> list[dict]:
    class_index = {name: i for i, name in enumerate(class_names)}
    return [_read_record(Path(folder), image_id, class_index) for image_id in image_ids]


def _image_file(folder: Path, image_id: str) -> str:
    return str(folder / "JPEGImages" / f"{image_id}.jpg")


def _read_record(folder: Path, image_id: str, class_index: dict[str, int]) -> dict:
    file = folder / "Annotations" / f"{image_id}.xml"
    name = printable_name(str(file))
    try:
        root = ElementTree.parse(file).getroot()
        width, height = (int(_text(root, f"size/{side}")) for side in ("width", "height"))
        if min(width, height) < 1:
            raise ValueError(f"its image size is {width} x {height} pixels")
        return {
            "file_name": _image_file(folder, image_id),
            "image_id": image_id,
            "height": height,
            "width": width,
            "annotations": [_annotation(node, class_index) for node in root.findall("object")],
        }
    except OSError as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else error.strerror
        raise UsageError(f"the annotation {name} {reason}") from error
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # LookupError: the encoding
        raise UsageError(f"the annotation {name} is malformed: {error}") from error


def _annotation(node: ElementTree.Element, class_index: dict[str, int]) -> dict:
    name = _text(node, "name")
    if name not in class_index:
        raise ValueError(
            f"class {name!r} is not in {list(class_index)}; set DATASETS.CLASS_NAMES to the class "
            "names of the annotations and MODEL.ROI_HEADS.NUM_CLASSES to their number"
        )
    corners = ("xmin", "ymin", "xmax", "ymax")
    x1, y1, x2, y2 = (float(_text(node, f"bndbox/{corner}")) for corner in corners)
    # Corners are pixel numbers, counted from 1, and both pixels belong to the box. If they are
    # equal, this would give a box of one pixel for what is an annotation mistake: keep it empty.
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
