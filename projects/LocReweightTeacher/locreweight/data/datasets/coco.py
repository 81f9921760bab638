"""Reader of annotation files in COCO's format."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode

from ...errors import UsageError
from .file_names import ImageFinder, printable_name, read_text

logger = logging.getLogger(__name__)


def load_coco(
    name: str, json_file: str, image_folder: str, *, allow_outside: bool = False
) -> list[dict]:
    """Read the boxes of a COCO json. Masks and keypoints are ignored, whatever they look like.

    Also sets ``thing_classes`` and ``thing_dataset_id_to_contiguous_id`` in Detectron2's metadata.
    Detectron2's own reader is not used: it drops boxes whose mask is unusual, and would parse the
    file a second time after it was checked.

    Args:
        name: name of the data set in Detectron2's catalogs.
        json_file: the annotation file.
        image_folder: folder that the file's ``file_name`` entries are relative to.
        allow_outside: ``file_name`` may lead out of that folder.

    Returns:
        records in Detectron2's standard format, in the order of image ids. Boxes are xywh in
        absolute pixels of the original image; annotations keep ``iscrowd`` and, if it is a number,
        ``area``.

    Raises:
        UsageError: if the file is not a COCO json; names the first problem.
    """
    content = _read_checked(json_file)
    categories = sorted(content["categories"], key=lambda category: category["id"])
    class_index = {category["id"]: i for i, category in enumerate(categories)}
    MetadataCatalog.get(name).set(
        thing_classes=[category["name"] for category in categories],
        thing_dataset_id_to_contiguous_id=class_index,
    )
    annotations = defaultdict(list)
    for entry in content["annotations"]:
        annotations[entry["image_id"]].append(_annotation(entry, class_index))
    images = sorted(content["images"], key=lambda image: image["id"])
    _warn_of_unknown_images(json_file, annotations, {image["id"] for image in images})
    images = _without_companions(json_file, images, annotations)
    finder = ImageFinder(json_file, image_folder, allow_outside=allow_outside)
    files = finder.find_all([image["file_name"] for image in images])
    return [
        {
            "file_name": file,
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": annotations.get(image["id"], []),
        }
        for image, file in zip(images, files, strict=True)
    ]


def _annotation(entry: dict[str, Any], class_index: dict[int, int]) -> dict[str, Any]:
    annotation = {
        "category_id": class_index[entry["category_id"]],
        "bbox": entry.get("bbox"),
        "bbox_mode": BoxMode.XYWH_ABS,
        "iscrowd": int(entry.get("iscrowd", 0)),
    }
    area = entry.get("area")
    if isinstance(area, int | float) and 0 <= area < float("inf"):
        annotation["area"] = area
    attributes = entry.get("attributes")  # of CVAT
    attributes = attributes if isinstance(attributes, dict) else {}
    rotation = entry.get("rotation", attributes.get("rotation"))
    if isinstance(rotation, int | float) and rotation % 360:
        annotation["rotation"] = rotation  # ignored, but reported by tools/check_data.py
    return annotation


def _without_companions(json_file: str, images: list[dict], annotations: dict) -> list[dict]:
    """Leave out images that are no images but metadata of macOS, if they have no annotations."""
    companions = [
        image["file_name"]
        for image in images
        if os.path.basename(image["file_name"]).startswith("._") and image["id"] not in annotations
    ]
    if not companions:
        return images
    logger.info(
        "%s: left out %d files of macOS that are no images, such as %s",
        json_file,
        len(companions),
        printable_name(companions[0]),
    )
    left_out = set(companions)
    return [image for image in images if image["file_name"] not in left_out]


def _warn_of_unknown_images(json_file: str, annotations: dict, images: set[int]) -> None:
    unknown = sorted(annotations.keys() - images)
    if unknown:
        logger.warning(
            "%s: %d annotations are of %d images that are not in its list of images, such as "
            "image_id %d; these annotations are not used",
            json_file,
            sum(len(annotations[image_id]) for image_id in unknown),
            len(unknown),
            unknown[0],
        )


# -- checks ----------------------------------------------------------------------------------------


def _read_checked(json_file: str) -> dict[str, Any]:
    def error(problem: str) -> UsageError:
        return UsageError(f"{printable_name(json_file)} is not a COCO annotation file: {problem}")

    try:
        content = json.loads(read_text(json_file))
    except OSError as reason:
        raise error(f"it cannot be read ({reason.strerror})") from reason
    except RecursionError as reason:
        raise error("it is nested too deeply") from reason
    except ValueError as reason:
        raise error(f"it is not json ({reason})") from reason
    if not isinstance(content, dict):
        raise error(f"its top level is a {type(content).__name__}, not an object")
    content.setdefault("annotations", [])  # files of unlabeled images have none
    if problem := _problem_of_lists(content) or _problem_of_ids(content):
        raise error(problem)
    return content


def _problem_of_lists(content: dict[str, Any]) -> str:
    """The first entry that is malformed; empty if there is none."""
    for key, fields in _FIELDS.items():
        if not isinstance(content.get(key), list):
            return f"it has no list named {key!r}"
        for entry in content[key]:
            problem = _problem_of_entry(entry, fields)
            if problem:
                return f"an entry of {key!r} {problem}: {str(entry)[:200]}"
    return "" if content["categories"] else "its list of categories is empty"


def _problem_of_ids(content: dict[str, Any]) -> str:
    for key in ("images", "categories", "annotations"):
        counts = Counter(entry["id"] for entry in content[key])
        repeated = [entry_id for entry_id, count in counts.items() if count > 1]
        if repeated:
            return f"the ids of {key!r} are not unique: {repeated[0]} occurs more than once"
    classes = {category["id"] for category in content["categories"]}
    for entry in content["annotations"]:
        if entry["category_id"] not in classes:
            return f"category_id={entry['category_id']} of an annotation is in no category"
        if entry.get("ignore", 0) not in (0, False):
            return f'annotation {entry["id"]} has "ignore": use "iscrowd": 1 instead'
    return ""


def _problem_of_entry(entry: Any, fields: dict[str, tuple[str, Callable[[Any], bool]]]) -> str:
    if not isinstance(entry, dict):
        return "is not an object"
    missing = [field for field in fields if field not in entry and field not in _OPTIONAL]
    if missing:
        return f"lacks {missing}"
    for field, (kind, fits) in fields.items():
        if field in entry and not fits(entry[field]):
            return f"has a {field!r} that is not {kind}"
    return ""


def _is_integer(value: Any) -> bool:
    return type(value) is int  # bool is a subclass of int


_INTEGER = "an integer", _is_integer
_SIZE = "a positive integer", lambda value: _is_integer(value) and value > 0
_TEXT = "a text", lambda value: isinstance(value, str)
_OPTIONAL = {"iscrowd", "bbox"}
_FIELDS: dict[str, dict[str, tuple[str, Callable[[Any], bool]]]] = {
    "images": {"id": _INTEGER, "file_name": _TEXT, "width": _SIZE, "height": _SIZE},
    "annotations": {
        "id": _INTEGER,
        "image_id": _INTEGER,
        "category_id": _INTEGER,
        # The numbers are checked later, since DATASETS.CHECKS.DROP_BAD_BOXES can leave them out.
        "bbox": ("a list of numbers", lambda value: isinstance(value, list) and bool(value)),
        "iscrowd": ("0 or 1", lambda value: value in (0, 1)),
    },
    "categories": {"id": _INTEGER, "name": _TEXT},
}
