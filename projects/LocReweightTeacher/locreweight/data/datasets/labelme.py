"""Reader of LabelMe's annotations: a json beside each image.

The reader is our own: the ``supervision`` library does not read this format, and ``labelme`` itself
is a program with a graphical interface.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

from detectron2.structures import BoxMode

from ...errors import UsageError
from ..image_io import image_size
from .file_names import ImageFinder, files_with_suffix, printable_name, read_text
from .labels import ClassNames

logger = logging.getLogger(__name__)

# Shapes without an extent, such as points that mark a position, are no objects of a box detector.
_SHAPES = {"rectangle", "polygon", "circle", "mask", "rotation", "oriented_rectangle"}
_LABELS_OF_NO_OBJECT = {"__ignore__", "_background_"}


def load_labelme(folder: str, class_names: Sequence[str]) -> tuple[list[dict], list[str]]:
    """Read LabelMe's json files in a folder and its subfolders.

    Rectangles, polygons, circles and masks, also rotated ones, become boxes; shapes of the same
    label and group are one object. Points and lines are left out. Images without a json are left
    out, because their objects are not known; other json files are ignored.

    Args:
        folder: with images and json files.
        class_names: in the order of the model's classes. If it is empty, the classes are those of
            the annotations in alphabetical order.

    Returns:
        records in Detectron2's standard format, with the path of the json without suffix as
        ``image_id``, and boxes as xyxy in absolute pixels of the original image; and the class
        names.

    Raises:
        UsageError: if a file is malformed, has a class that is not in ``class_names``, or is of the
            same image as another one.
    """
    classes = ClassNames(class_names)
    finder = ImageFinder(folder, folder, allow_outside=False)
    left_out: Counter[str] = Counter()
    file_of: dict[str, str] = {}
    records = []
    for file in files_with_suffix(folder, ".json"):
        content = _read_json(os.path.join(folder, file))
        if content is None:
            continue
        stem = os.path.splitext(file)[0]
        try:
            annotations = _annotations(content["shapes"], classes, left_out)
        except ValueError as error:
            name = printable_name(os.path.join(folder, file))
            raise UsageError(f"the annotation {name} is malformed: {error}") from error
        image = _find_image(finder, folder, stem, content.get("imagePath"))
        other = file_of.setdefault(image, file)
        if other != file:
            raise UsageError(
                f"{printable_name(other)} and {printable_name(file)} in {printable_name(folder)} "
                f"belong to the same image {printable_name(image)}: correct `imagePath` in one of "
                "them, or remove one"
            )
        width, height = _size(image, content)
        records.append(
            {
                "file_name": image,
                "image_id": stem,
                "width": width,
                "height": height,
                "annotations": annotations,
            }
        )
    if not records:
        raise UsageError(f"there is no json file of LabelMe in {folder}")
    if left_out:
        shapes = ", ".join(f"{count} of type {kind}" for kind, count in left_out.items())
        logger.warning("%s: left out shapes that are no boxes: %s", folder, shapes)
    return classes.with_indices(records), classes.names


def _read_json(file: str) -> dict[str, Any] | None:
    """The content of LabelMe's json; None for other json files."""
    try:
        content = json.loads(read_text(file))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"the annotation {printable_name(file)} is not json: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        logger.info("%s is not an annotation of LabelMe, so it is not used", printable_name(file))
        return None
    return content


def _find_image(finder: ImageFinder, folder: str, stem: str, image_path: Any) -> str:
    """The image that the json names, or else that of the same name beside it."""
    name = image_path.replace("\\", "/") if isinstance(image_path, str) else ""
    named = os.path.normpath(os.path.join(os.path.dirname(stem), name))
    is_inside = name and not os.path.isabs(named) and not named.startswith("..")
    if is_inside and os.path.isfile(os.path.join(folder, named)):
        return os.path.join(folder, named)
    return finder.find_with_stem(stem, name)


def _size(image: str, content: dict[str, Any]) -> tuple[int, int]:
    """Width and height in pixels: of the json if it has them, else of the image."""
    width, height = content.get("imageWidth"), content.get("imageHeight")
    if type(width) is int and type(height) is int and min(width, height) > 0:
        return width, height
    return image_size(image)


def _annotations(shapes: list[Any], classes: ClassNames, left_out: Counter[str]) -> list[dict]:
    boxes: dict[Any, tuple[str, list[float]]] = {}
    for i, shape in enumerate(shapes):
        if not isinstance(shape, dict) or not isinstance(shape.get("label"), str):
            raise ValueError(f"a shape has no label: {str(shape)[:100]}")
        label, kind = shape["label"].strip(), shape.get("shape_type") or "polygon"
        if label in _LABELS_OF_NO_OBJECT:
            continue
        if kind not in _SHAPES:
            left_out[str(kind)] += 1
            continue
        box = _box(kind, shape)
        group = shape.get("group_id")
        key = i if group is None else (label, str(group))
        if key in boxes:
            x1, y1, x2, y2 = boxes[key][1]
            box = [min(x1, box[0]), min(y1, box[1]), max(x2, box[2]), max(y2, box[3])]
        boxes[key] = label, box
    return [
        {
            "category_id": classes.index(label),
            "bbox": box,
            "bbox_mode": BoxMode.XYXY_ABS,
            "iscrowd": 0,
        }
        for label, box in boxes.values()
    ]


def _box(kind: str, shape: dict[str, Any]) -> list[float]:
    """The box around a shape, xyxy."""
    try:
        points = [(float(x), float(y)) for x, y in shape["points"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"a shape's points are not pairs of numbers: {str(shape)[:100]}"
        ) from error
    if len(points) < 2:
        raise ValueError(f"a {kind} has fewer than two points: {str(shape)[:100]}")
    if kind == "circle":  # its center, and a point on it
        (x, y), edge = points[:2]
        radius = math.dist((x, y), edge)
        return [x - radius, y - radius, x + radius, y + radius]
    xs, ys = zip(*points, strict=True)
    return [min(xs), min(ys), max(xs), max(ys)]
