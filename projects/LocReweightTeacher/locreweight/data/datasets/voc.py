"""Reader of Pascal VOC annotations, in VOC's layout or beside the images, as labelImg writes."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from detectron2.structures import BoxMode

from ...errors import UsageError
from .file_names import (
    IMAGE_SUFFIXES,
    ImageFinder,
    check_inside,
    files_with_suffix,
    printable_name,
    read_text,
)
from .labels import ClassNames


def load_voc(
    folder: str, split: str, class_names: list[str], *, allow_outside: bool = False
) -> list[dict]:
    """Read the annotated images of a split.

    Objects marked as difficult become ``iscrowd`` annotations, which are left out of training and
    ignored in evaluation. Detectron2's reader does not tell them from other objects.

    Args:
        folder: with ``Annotations``, ``JPEGImages`` and ``ImageSets/Main/<split>.txt``. Images may
            be of any kind that can be read, not only .jpg.
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
    image_ids = read_split(folder, split, allow_outside)
    finder = _finder(folder, split, allow_outside)
    classes = ClassNames(class_names)
    return [_read_record(_annotation_file(folder, i), i, i, finder, classes) for i in image_ids]


def load_voc_images(folder: str, split: str, *, allow_outside: bool = False) -> list[dict]:
    """Read the images of a split without their annotations, which need not exist.

    Args:
        folder, split, allow_outside: as for :func:`load_voc`.

    Returns:
        records with ``file_name`` and ``image_id`` only.

    Raises:
        UsageError: if the list of images cannot be used.
    """
    finder = _finder(folder, split, allow_outside)
    return [
        {"file_name": finder.find_with_stem(i, i), "image_id": i}
        for i in read_split(folder, split, allow_outside)
    ]


def load_voc_folder(folder: str, class_names: Sequence[str]) -> tuple[list[dict], list[str]]:
    """Read the xml files of a folder and its subfolders, each beside its image.

    Images without an xml file are left out, because their objects are not known.

    Args:
        folder: with images and xml files of the same names. In a folder ``Annotations``, xml files
            are of the images in the folder ``JPEGImages`` or ``images`` beside it.
        class_names: in the order of the model's classes. If it is empty, the classes are those of
            the annotations in alphabetical order.

    Returns:
        records as of :func:`load_voc`, with the path of the xml file without suffix as
        ``image_id``; and the class names.

    Raises:
        UsageError: for a missing or malformed annotation, or a class that is not in
            ``class_names``.
    """
    files = files_with_suffix(folder, ".xml")
    if not files:
        raise UsageError(f"there is no xml file in {folder}")
    classes = ClassNames(class_names)
    finder = ImageFinder(folder, folder, allow_outside=False)
    records = []
    for file in files:
        image_id = file[: -len(".xml")]
        stem = _image_stem(folder, image_id)
        records.append(_read_record(os.path.join(folder, file), image_id, stem, finder, classes))
    return classes.with_indices(records), classes.names


def used_class_names(folder: str, split: str, *, allow_outside: bool = False) -> list[str]:
    """Class names in the annotations of a split, sorted. Malformed annotations are left out.

    Args:
        folder, split, allow_outside: as for :func:`load_voc`.

    Raises:
        UsageError: if the list of images cannot be used.
    """
    names: set[str] = set()
    for image_id in read_split(folder, split, allow_outside):
        try:
            root = ElementTree.parse(_annotation_file(folder, image_id)).getroot()
        except (OSError, ValueError, LookupError, ElementTree.ParseError):
            continue
        names.update((node.text or "").strip() for node in root.findall("object/name"))
    return sorted(names)


def split_file(folder: str, split: str) -> str:
    """Path of the list of a split's images."""
    return str(Path(folder) / "ImageSets" / "Main" / f"{split}.txt")


def read_split(folder: str, split: str, allow_outside: bool) -> list[str]:
    """Read the image ids of a split.

    Raises:
        UsageError: if the list is not text, or lists an image twice.
    """
    file = split_file(folder, split)
    try:
        lines = read_text(file).splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not a list of images: {error}") from error
    finder = _finder(folder, split, allow_outside)
    image_ids = [_without_flag(folder, line.strip(), finder) for line in lines if line.strip()]
    for image_id in image_ids:
        check_inside(image_id, file, folder, allow_outside=allow_outside)
    image_ids = [_without_suffix(folder, image_id) for image_id in image_ids]
    repeated = [image_id for image_id, count in Counter(image_ids).items() if count > 1]
    if repeated:
        raise UsageError(f"{file} lists {printable_name(repeated[0])} more than once")
    return image_ids


def _without_flag(folder: str, line: str, finder: ImageFinder) -> str:
    """The list of a class has a flag behind each name: whether the image shows the class.

    Images can also have names such as "photo 1", which are used as they are.
    """
    image_id = re.sub(r"\s+-?[01]$", "", line)
    if image_id == line or os.path.lexists(_annotation_file(folder, line)) or finder.has(line):
        return line
    return image_id


def _without_suffix(folder: str, image_id: str) -> str:
    """Some lists name image files instead of images."""
    stem, suffix = os.path.splitext(image_id)
    if suffix.lower() not in IMAGE_SUFFIXES:
        return image_id
    annotations = Path(folder) / "Annotations"
    is_file_name = not (annotations / f"{image_id}.xml").exists()
    return stem if is_file_name and (annotations / f"{stem}.xml").exists() else image_id


def _annotation_file(folder: str, image_id: str) -> str:
    return os.path.join(folder, "Annotations", f"{image_id}.xml")


def _finder(folder: str, split: str, allow_outside: bool) -> ImageFinder:
    images = str(Path(folder) / "JPEGImages")
    return ImageFinder(split_file(folder, split), images, allow_outside=allow_outside)


def _image_stem(folder: str, image_id: str) -> str:
    """Where the image of an xml file is expected, without suffix, relative to the folder."""
    parent, name = os.path.split(image_id)
    if os.path.basename(parent).lower() != "annotations":
        return image_id
    for images in ("JPEGImages", "images"):
        sibling = os.path.join(os.path.dirname(parent), images)
        if os.path.isdir(os.path.join(folder, sibling)):
            return os.path.join(sibling, name)
    return image_id


def _read_record(
    file: str, image_id: str, stem: str, finder: ImageFinder, classes: ClassNames
) -> dict:
    """
    Args:
        file: the xml file.
        image_id: of the record.
        stem: path of the image without suffix, for ``finder``.
        finder: finds images.
        classes: classes of the annotations.
    """
    name = printable_name(file)
    try:
        root = ElementTree.parse(file).getroot()
        width, height = (int(_text(root, f"size/{side}")) for side in ("width", "height"))
        if min(width, height) < 1:
            raise ValueError(f"its image size is {width} x {height} pixels")
        annotations = [_annotation(node, classes) for node in root.findall("object")]
    except OSError as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else error.strerror
        raise UsageError(f"the annotation {name} {reason}") from error
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # LookupError: the encoding
        raise UsageError(f"the annotation {name} is malformed: {error}") from error
    return {
        "file_name": finder.find_with_stem(stem, (root.findtext("filename") or "").strip()),
        "image_id": image_id,
        "height": height,
        "width": width,
        "annotations": annotations,
    }


def _annotation(node: ElementTree.Element, classes: ClassNames) -> dict:
    corners = ("xmin", "ymin", "xmax", "ymax")
    category_id = classes.index(_text(node, "name"))
    x1, y1, x2, y2 = (float(_text(node, f"bndbox/{corner}")) for corner in corners)
    # Corners are pixel numbers, counted from 1, and both pixels belong to the box. If they are
    # equal, this would give a box of one pixel for what is an annotation mistake: keep it empty.
    return {
        "category_id": category_id,
        "bbox": [x1 - (x2 != x1), y1 - (y2 != y1), x2, y2],
        "bbox_mode": BoxMode.XYXY_ABS,
        "iscrowd": int(node.findtext("difficult", "").strip().lower() in ("1", "true")),
    }


def _text(node: ElementTree.Element, path: str) -> str:
    text = node.findtext(path)
    if text is None:
        raise ValueError(f"it has no <{path}>")
    return text.strip()
