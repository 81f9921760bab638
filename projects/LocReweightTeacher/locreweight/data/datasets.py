"""Data sets named in the config by where they lie, without a line of Python.

======================================  ==========================================================
name                                    what it is
======================================  ==========================================================
``coco:<annotations.json>:<images>``    COCO json and the folder of its images
``voc:<folder>:<split>``                ``Annotations``, ``ImageSets/Main/<split>.txt``,
                                        ``JPEGImages``
``folder:<images>``                     images without annotations, at any depth
anything else                           a data set that Detectron2 has registered
======================================  ==========================================================

Boxes of records are xyxy or xywh as each record says, in absolute pixels of the original image.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.data.datasets.pascal_voc import CLASS_NAMES as VOC_CLASSES
from detectron2.structures import BoxMode

from ..errors import UsageError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}


def register(names: Iterable[str], class_names: Iterable[str] = ()) -> None:
    """Make every name known to Detectron2's catalogs; nothing is read but what a check needs.

    Args:
        names: as in the table above.
        class_names: of ``voc:`` data sets; VOC's twenty if empty.

    Raises:
        UsageError: for an unknown name, a missing file or folder.
    """
    for name in names:
        kind, _, rest = name.partition(":")
        if name in DatasetCatalog.list():
            continue
        if kind == "coco":
            _register_coco(name, *_two_parts(name, rest, "coco:<annotations.json>:<image folder>"))
        elif kind == "voc":
            folder, split = _two_parts(name, rest, "voc:<folder>:<split>")
            _register_voc(name, folder, split, list(class_names) or list(VOC_CLASSES))
        elif kind == "folder":
            _need_folder(rest, name)
            DatasetCatalog.register(name, partial(load_folder, rest))
        else:
            raise UsageError(
                f"unknown data set {name!r}. Name one that Detectron2 has registered, or say where "
                "it lies: coco:<annotations.json>:<image folder>, voc:<folder>:<split>, "
                "folder:<image folder>"
            )


def load_folder(folder: str) -> list[dict]:
    """Records of all images in a folder, at any depth, in order of their names.

    Raises:
        UsageError: if there is none.
    """
    paths = sorted(_image_paths(folder))
    if not paths:
        suffixes = " ".join(sorted(IMAGE_SUFFIXES))
        raise UsageError(f"no image ({suffixes}) in the folder {folder}")
    return [{"file_name": path, "image_id": i} for i, path in enumerate(paths)]


def load_coco(name: str, json_file: str, image_folder: str) -> list[dict]:
    """Records of a COCO json, by Detectron2's own reader.

    Raises:
        UsageError: if the file is not COCO json; says what is wrong with it.
    """
    try:
        return load_coco_json(json_file, image_folder, name)
    except Exception as error:
        # The reader trips over a broken file in many ways; say what is wrong, not where it fell.
        problem = _coco_problem(json_file) or f"{type(error).__name__}: {error}"
        raise UsageError(f"{json_file} is not a COCO annotation file: {problem}") from error


def load_voc(folder: str, split: str, class_names: list[str]) -> list[dict]:
    """Records of a folder in Pascal VOC's layout.

    Unlike Detectron2's reader, objects marked difficult are kept apart: as ``iscrowd`` they are
    left out of training and ignored in evaluation.

    Raises:
        UsageError: for a missing or broken annotation, or a class that is not in ``class_names``.
    """
    lines = (Path(folder) / "ImageSets" / "Main" / f"{split}.txt").read_text().splitlines()
    ids = [line.split()[0] for line in lines if line.strip()]
    index = {name: i for i, name in enumerate(class_names)}
    return [_voc_record(Path(folder), image_id, index) for image_id in ids]


def _image_paths(folder: str) -> Iterator[str]:
    for parent, _, files in os.walk(folder):
        for file in files:
            if os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES:
                yield os.path.join(parent, file)


def _two_parts(name: str, rest: str, form: str) -> tuple[str, str]:
    first, separator, second = rest.rpartition(":")
    if not (first and separator and second):
        raise UsageError(f"the data set name {name!r} is not of the form {form}")
    return first, second


def _need_folder(folder: str, name: str) -> None:
    if not os.path.isdir(folder):
        raise UsageError(f"the folder {folder!r} of the data set {name!r} does not exist")


def _need_file(file: str, name: str) -> None:
    if not os.path.isfile(file):
        raise UsageError(f"the file {file!r} of the data set {name!r} does not exist")


def _register_coco(name: str, json_file: str, image_folder: str) -> None:
    _need_file(json_file, name)
    _need_folder(image_folder, name)
    DatasetCatalog.register(name, partial(load_coco, name, json_file, image_folder))
    MetadataCatalog.get(name).set(image_root=image_folder, evaluator_type="coco")


def _register_voc(name: str, folder: str, split: str, class_names: list[str]) -> None:
    _need_folder(folder, name)
    _need_file(os.path.join(folder, "ImageSets", "Main", f"{split}.txt"), name)
    DatasetCatalog.register(name, partial(load_voc, folder, split, class_names))
    MetadataCatalog.get(name).set(
        thing_classes=class_names,
        dirname=folder,
        split=split,
        year=2007,  # the 11-point metric
        evaluator_type="pascal_voc",
    )


def _coco_problem(json_file: str) -> str | None:
    try:
        content = json.loads(Path(json_file).read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        return f"it is not json ({error})"
    if not isinstance(content, dict):
        return f"its top level is a {type(content).__name__}, not an object"
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list):
            return f"it has no list named {key!r}"
    if not content["categories"]:
        return "its list of categories is empty"
    for key, fields in {
        "images": ("id", "file_name", "width", "height"),
        "annotations": ("id", "image_id", "category_id", "bbox"),
        "categories": ("id", "name"),
    }.items():
        for entry in content[key]:
            missing = [field for field in fields if field not in entry]
            if missing:
                return f"an entry of {key!r} lacks {missing}: {str(entry)[:200]}"
    return None


def _voc_record(folder: Path, image_id: str, class_index: dict[str, int]) -> dict:
    file = folder / "Annotations" / f"{image_id}.xml"
    try:
        root = ElementTree.parse(file).getroot()
        return {
            "file_name": str(folder / "JPEGImages" / f"{image_id}.jpg"),
            "image_id": image_id,
            "height": int(_text(root, "size/height")),
            "width": int(_text(root, "size/width")),
            "annotations": [_voc_object(node, class_index) for node in root.findall("object")],
        }
    except FileNotFoundError as error:
        raise UsageError(f"the annotation {file} does not exist") from error
    except (ElementTree.ParseError, ValueError) as error:
        raise UsageError(f"the annotation {file} is broken: {error}") from error


def _voc_object(node: ElementTree.Element, class_index: dict[str, int]) -> dict:
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
