"""Annotation files in COCO's format."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from detectron2.data.datasets import load_coco_json

from ...errors import UsageError
from ..image_io import single_line
from .file_names import check_inside


def load_coco(
    name: str, json_file: str, image_folder: str, *, allow_outside: bool = False
) -> list[dict]:
    """Records of a COCO json, by Detectron2's own reader; before, the file is looked through.

    Args:
        name: of the data set in Detectron2's catalogs.
        json_file: the annotation file.
        image_folder: what its ``file_name`` entries are relative to.
        allow_outside: they may lead out of that folder.

    Raises:
        UsageError: if the file is not COCO json; says what is wrong with it.
    """
    wrong = f"{json_file} is not a COCO annotation file: "
    problem = _problem(json_file, image_folder, allow_outside)
    if problem:
        raise UsageError(wrong + problem)
    try:
        return load_coco_json(json_file, image_folder, name)
    except Exception as error:  # what was overlooked, such as in polygons that nobody asks for
        raise UsageError(wrong + single_line(error)) from error


def _problem(json_file: str, image_folder: str, allow_outside: bool) -> str:
    """What Detectron2's reader would trip over, or pass over in silence; empty if nothing."""
    try:
        content = json.loads(Path(json_file).read_text(encoding="utf-8"))
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    except RecursionError:
        return "it is nested too deeply"
    except ValueError as error:
        return f"it is not json ({error})"
    if not isinstance(content, dict):
        return f"its top level is a {type(content).__name__}, not an object"
    content.setdefault("annotations", [])  # unlabeled images need none
    for key, fields in _FIELDS.items():
        if not isinstance(content.get(key), list):
            return f"it has no list named {key!r}"
        for entry in content[key]:
            problem = _problem_of_entry(entry, fields)
            if problem:
                return f"an entry of {key!r} {problem}: {str(entry)[:200]}"
    if not content["categories"]:
        return "its list of categories is empty"
    for key in ("images", "categories"):  # those of annotations are Detectron2's to check
        repeated = [i for i, n in Counter(entry["id"] for entry in content[key]).items() if n > 1]
        if repeated:
            return f"the ids of {key!r} are not unique: {repeated[0]} occurs more than once"
    classes = {entry["id"] for entry in content["categories"]}
    for entry in content["annotations"]:
        if entry["category_id"] not in classes:
            return f"category_id={entry['category_id']} of an annotation is in no category"
    for entry in content["images"]:
        check_inside(entry["file_name"], json_file, image_folder, allow_outside=allow_outside)
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
    return type(value) is int  # a bool is not meant


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
        # Its numbers are looked at later: DATASETS.CHECKS.DROP_BAD_BOXES leaves bad ones out.
        "bbox": ("a list of numbers", lambda value: isinstance(value, list) and bool(value)),
        "iscrowd": ("0 or 1", lambda value: value in (0, 1)),
    },
    "categories": {"id": _INTEGER, "name": _TEXT},
}
