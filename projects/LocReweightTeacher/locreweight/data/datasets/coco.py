"""Reader of annotation files in COCO's format."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode

from ...errors import UsageError
from .file_names import ImageFinder, decode_text, printable_name
from .record_cache import NO_CACHE, RecordCache, garbage_collection_paused

logger = logging.getLogger(__name__)

# Part of the name of cached files: change it when _parse returns something else.
_CACHE_VERSION = "coco-1"


@dataclass(frozen=True)
class _Parsed:
    """A checked annotation file, without what is not used.

    Attributes:
        class_names: in the order of the category ids.
        class_index: category id -> index of its name.
        images: ``id``, ``file_name``, ``width`` and ``height``, in the order of ids.
        annotations: image id -> annotations in Detectron2's standard format.
    """

    class_names: list[str]
    class_index: dict[int, int]
    images: list[dict]
    annotations: dict[int, list[dict]]


def load_coco(
    name: str,
    json_file: str,
    image_folder: str,
    *,
    allow_outside: bool = False,
    labeled: bool = False,
    cache: RecordCache = NO_CACHE,
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
        labeled: the boxes are used, so that a file of masks without boxes is an error.
        cache: of parsed files. Image files are searched each time.

    Returns:
        records in Detectron2's standard format, in the order of image ids. Boxes are xywh in
        absolute pixels of the original image; annotations keep ``iscrowd`` and, if it is a number,
        ``area``.

    Raises:
        UsageError: if the file is not a COCO json; names the first problem.
    """
    with garbage_collection_paused():
        parsed = _read(json_file, cache)
    MetadataCatalog.get(name).set(
        thing_classes=parsed.class_names, thing_dataset_id_to_contiguous_id=parsed.class_index
    )
    annotations = parsed.annotations
    if labeled:
        _check_has_boxes(json_file, annotations)
    _warn_of_unknown_images(json_file, annotations, {image["id"] for image in parsed.images})
    images = _without_companions(json_file, parsed.images, annotations)
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


def _read(json_file: str, cache: RecordCache) -> _Parsed:
    def error(problem: str) -> UsageError:
        return UsageError(f"{printable_name(json_file)} is not a COCO annotation file: {problem}")

    def parse(text: bytes) -> tuple:
        try:
            content = json.loads(decode_text(text))
        except RecursionError as reason:
            raise error("it is nested too deeply") from reason
        except ValueError as reason:
            raise error(f"it is not json ({reason})") from reason
        if not isinstance(content, dict):
            raise error(f"its top level is a {type(content).__name__}, not an object")
        content.setdefault("annotations", [])  # files of unlabeled images have none
        if problem := _problem_of_lists(content) or _problem_of_ids(content):
            raise error(problem)
        return _convert(content)

    try:
        text = Path(json_file).read_bytes()
    except OSError as reason:
        raise error(f"it cannot be read ({reason.strerror})") from reason
    return _Parsed(*cache.get(text, _CACHE_VERSION, parse))


def _convert(content: dict[str, Any]) -> tuple:
    """The fields of :class:`_Parsed`."""
    categories = sorted(content["categories"], key=lambda category: category["id"])
    class_index = {category["id"]: i for i, category in enumerate(categories)}
    annotations = defaultdict(list)
    for entry in content["annotations"]:
        annotations[entry["image_id"]].append(_annotation(entry, class_index))
    images = sorted(content["images"], key=lambda image: image["id"])
    return (
        [category["name"] for category in categories],
        class_index,
        [{field: image[field] for field in _FIELDS["images"]} for image in images],
        dict(annotations),
    )


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
    if "rotation" in entry or "attributes" in entry:
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


def _check_has_boxes(json_file: str, annotations: dict[int, list[dict]]) -> None:
    boxes = [a["bbox"] for of_image in annotations.values() for a in of_image]
    if boxes and not any(boxes):
        raise UsageError(
            f"no annotation of {printable_name(json_file)} has a bbox, and masks are not read: "
            'give each annotation "bbox": [x, y, width, height] in pixels, for example with '
            "pycocotools.mask.toBbox"
        )


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


@dataclass(frozen=True)
class _Field:
    """A field of an entry.

    Attributes:
        kind: what its value must be, for messages.
        fits: whether a value is of this kind.
        all_fit: whether all values of a list certainly are, in a fraction of the time.
    """

    kind: str
    fits: Callable[[Any], bool]
    all_fit: Callable[[list], bool]


def _problem_of_lists(content: dict[str, Any]) -> str:
    """The first entry that is malformed; empty if there is none."""
    for key, fields in _FIELDS.items():
        if not isinstance(content.get(key), list):
            return f"it has no list named {key!r}"
        if _are_regular(content[key], fields):
            continue
        for entry in content[key]:
            problem = _problem_of_entry(entry, fields)
            if problem:
                return f"an entry of {key!r} {problem}: {str(entry)[:200]}"
    return "" if content["categories"] else "its list of categories is empty"


def _are_regular(entries: list, fields: dict[str, _Field]) -> bool:
    """Whether all entries have all required fields, with values of the usual types.

    This takes a fraction of the time of :func:`_problem_of_entry`, which decides all other cases.
    """
    if not set(map(type, entries)) <= {dict}:
        return False
    for name, field in fields.items():
        values = [entry[name] for entry in entries if name in entry]
        if name not in _OPTIONAL and len(values) < len(entries):
            return False
        if not field.all_fit(values):
            return False
    return True


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


def _problem_of_entry(entry: Any, fields: dict[str, _Field]) -> str:
    if not isinstance(entry, dict):
        return "is not an object"
    missing = [name for name in fields if name not in entry and name not in _OPTIONAL]
    if missing:
        return f"lacks {missing}"
    for name, field in fields.items():
        if name in entry and not field.fits(entry[name]):
            return f"has a {name!r} that is not {field.kind}"
    return ""


def _is_integer(value: Any) -> bool:
    return type(value) is int  # bool is a subclass of int


def _have_type(values: list, expected: type) -> bool:
    return set(map(type, values)) <= {expected}


_INTEGER = _Field("an integer", _is_integer, lambda values: _have_type(values, int))
_SIZE = _Field(
    "a positive integer",
    lambda value: _is_integer(value) and value > 0,
    lambda values: _have_type(values, int) and min(values, default=1) > 0,
)
_TEXT = _Field(
    "a text", lambda value: isinstance(value, str), lambda values: _have_type(values, str)
)
_OPTIONAL = {"iscrowd", "bbox"}
_FIELDS: dict[str, dict[str, _Field]] = {
    "images": {"id": _INTEGER, "file_name": _TEXT, "width": _SIZE, "height": _SIZE},
    "annotations": {
        "id": _INTEGER,
        "image_id": _INTEGER,
        "category_id": _INTEGER,
        # The numbers are checked later, since DATASETS.CHECKS.DROP_BAD_BOXES can leave them out.
        "bbox": _Field(
            "a list of numbers",
            lambda value: isinstance(value, list) and bool(value),
            lambda values: _have_type(values, list) and all(values),
        ),
        "iscrowd": _Field(
            "0 or 1",
            lambda value: value in (0, 1),
            lambda values: _have_type(values, int) and set(values) <= {0, 1},
        ),
    },
    "categories": {"id": _INTEGER, "name": _TEXT},
}
