"""Data sets of a few small images, made in an instant: what tests train and evaluate on.

All functions take a folder to write into; the same arguments give the same files.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("cat", "dog", "owl")


def make_coco(
    folder: Path,
    images: int = 4,
    boxes_per_image: int = 2,
    classes: tuple[str, ...] = CLASSES,
    size: int | tuple[int, int] = 64,
    seed: int = 0,
) -> tuple[Path, Path]:
    """``annotations.json`` and the folder of its PNG images; ``size`` is a side or (h, w)."""
    rng = np.random.default_rng(seed)
    shapes = [_boxes(rng, boxes_per_image, len(classes), size) for _ in range(images)]
    image_folder = _write_images(folder / "images", shapes, size, rng, ".png")
    height, width = _height_width(size)
    annotations = [
        {
            "image_id": i + 1,
            "category_id": label + 1,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": (x2 - x1) * (y2 - y1),
            "iscrowd": 0,
        }
        for i, boxes in enumerate(shapes)
        for label, x1, y1, x2, y2 in boxes
    ]
    content = {
        "images": [
            {"id": i + 1, "file_name": f"{i:04d}.png", "width": width, "height": height}
            for i in range(images)
        ],
        "annotations": [{"id": i + 1, **entry} for i, entry in enumerate(annotations)],
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(classes)],
    }
    json_file = folder / "annotations.json"
    json_file.write_text(json.dumps(content))
    return json_file, image_folder


def make_voc(
    folder: Path,
    images: int = 4,
    boxes_per_image: int = 2,
    classes: tuple[str, ...] = CLASSES,
    size: int | tuple[int, int] = 64,
    seed: int = 0,
    split: str = "trainval",
) -> Path:
    """A folder in Pascal VOC's layout: JPG images, XML annotations and one split of all of them."""
    rng = np.random.default_rng(seed)
    shapes = [_boxes(rng, boxes_per_image, len(classes), size) for _ in range(images)]
    _write_images(folder / "JPEGImages", shapes, size, rng, ".jpg")
    for i, boxes in enumerate(shapes):
        # Corners are counted from 1, and the last pixel belongs to the box.
        objects = [(classes[label], x1 + 1, y1 + 1, x2, y2) for label, x1, y1, x2, y2 in boxes]
        write_voc_xml(folder / "Annotations" / f"{i:04d}.xml", objects, size)
    listed = folder / "ImageSets" / "Main" / f"{split}.txt"
    listed.parent.mkdir(parents=True)
    listed.write_text("".join(f"{i:04d}\n" for i in range(images)))
    return folder


def make_folder(
    folder: Path, images: int = 4, size: int | tuple[int, int] = 64, seed: int = 0
) -> Path:
    """A folder of PNG images."""
    rng = np.random.default_rng(seed)
    shapes = [_boxes(rng, 2, len(CLASSES), size) for _ in range(images)]
    return _write_images(folder, shapes, size, rng, ".png")


def write_voc_xml(
    file: Path,
    objects: list[tuple],
    size: int | tuple[int, int] = 64,
    difficult: bool = False,
) -> None:
    """One annotation of objects (name, xmin, ymin, xmax, ymax), as VOC writes them."""
    height, width = _height_width(size)
    entries = "".join(
        f"<object><name>{name}</name><pose>Unspecified</pose><truncated>0</truncated>"
        f"<difficult>{int(difficult)}</difficult><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin>"
        f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for name, x1, y1, x2, y2 in objects
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        f"<annotation><size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
        f"{entries}</annotation>"
    )


def edit_json(file: Path, edit) -> None:
    """Rewrite a json file with what ``edit`` makes of its content, in place or returned."""
    content = json.loads(file.read_text())
    changed = edit(content)
    file.write_text(json.dumps(content if changed is None else changed))


def _height_width(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _boxes(
    rng: np.random.Generator, count: int, classes: int, size: int | tuple[int, int]
) -> list[tuple[int, int, int, int, int]]:
    """(class, x1, y1, x2, y2) in whole pixels, a quarter to a half of the image wide and high."""
    height, width = _height_width(size)
    boxes = []
    for _ in range(count):
        box_width, box_height = (int(rng.integers(s // 4, s // 2 + 1)) for s in (width, height))
        x = int(rng.integers(0, width - box_width + 1))
        y = int(rng.integers(0, height - box_height + 1))
        boxes.append((int(rng.integers(classes)), x, y, x + box_width, y + box_height))
    return boxes


def _write_images(
    folder: Path, shapes: list, size: int | tuple[int, int], rng: np.random.Generator, suffix: str
) -> Path:
    folder.mkdir(parents=True)
    for i, boxes in enumerate(shapes):
        image = rng.integers(0, 80, size=(*_height_width(size), 3), dtype=np.uint8)
        for label, x1, y1, x2, y2 in boxes:
            image[y1:y2, x1:x2] = np.roll([250, 120, 20], label)
        Image.fromarray(image).save(folder / f"{i:04d}{suffix}", quality=95)
    return folder
