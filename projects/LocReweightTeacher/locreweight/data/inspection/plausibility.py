"""Findings about valid annotations that are probably not what they seem."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

import numpy as np
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.structures import BoxMode

from ..datasets.catalog import expand_path
from ..datasets.file_names import IMAGE_SUFFIXES, is_companion
from .findings import DataSets, Finding, Severity

# Image types that are not read, but that cameras and editors write.
UNREAD_SUFFIXES = {
    *(".heic", ".heif", ".avif", ".jxl", ".jp2", ".j2k", ".jfif", ".pgm", ".ppm", ".pnm", ".tga"),
    *(".dng", ".raw", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".psd", ".svg", ".dcm"),
}
MIN_SIDE = 4.0  # pixels of the resized image; smaller objects are hard to detect
_MIN_SHARE = 0.2  # of boxes that leave their image, from which on an xyxy file is suspected
_TOLERANCE = 1.0  # pixels that a box may leave its image by


def plausibility_findings(cfg: CfgNode, sets: DataSets) -> list[Finding]:
    """Check coordinates, sizes, repetitions and rotations of boxes, and types of image files."""
    findings = []
    for name, records in (sets.train | sets.test).items():
        boxes, sizes, files = _boxes_of(records)
        if len(boxes):
            findings += _coordinate_findings(name, boxes, sizes, files)
            findings += _small_box_findings(cfg, name, boxes, sizes, files)
        findings += _repeated_box_findings(name, records)
        findings += _rotation_findings(name, records)
    return findings + _image_type_findings(cfg)


def _boxes_of(records: list[dict]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """``(N, 4)`` xywh boxes in absolute pixels, ``(N, 2)`` image sizes (w, h), and N file names."""
    boxes, sizes, files = [], [], []
    for record in records:
        for annotation in record.get("annotations", []):
            try:
                box = BoxMode.convert(
                    list(annotation["bbox"]), annotation["bbox_mode"], BoxMode.XYWH_ABS
                )
                boxes.append([float(value) for value in box])
            except (AssertionError, OverflowError, TypeError, ValueError):
                continue  # another finding reports malformed boxes
            sizes.append([record.get("width", np.inf), record.get("height", np.inf)])
            files.append(record["file_name"])
    return np.array(boxes).reshape(-1, 4), np.array(sizes, float).reshape(-1, 2), files


def _coordinate_findings(
    name: str, boxes: np.ndarray, sizes: np.ndarray, files: list[str]
) -> list[Finding]:
    if 0 < boxes.max() <= 1:
        text = (
            f"{name}: the coordinates of all {len(boxes)} boxes are at most 1, such as "
            f"{_describe(boxes[0])}: they seem to be fractions of the image size. Multiply them by "
            "the width and height of the image"
        )
        return [Finding(Severity.ERROR, text, files)]
    leaves = ((boxes[:, :2] + boxes[:, 2:]) > sizes + _TOLERANCE).any(axis=1)
    valid_as_xyxy = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    valid_as_xyxy &= (boxes[:, 2:] <= sizes + _TOLERANCE).all(axis=1)
    if leaves.mean() < _MIN_SHARE:
        return []
    example = int(leaves.argmax())
    width, height = sizes[example]
    text = (
        f"{name}: {leaves.sum()} of {len(boxes)} boxes reach beyond the right or lower edge of "
        f"their image, such as {_describe(boxes[example])} in an image of {width:g} x {height:g} "
        "pixels. Boxes are clipped to the image. "
    )
    text += (
        "The file seems to hold corners (x1, y1, x2, y2), but the format is (x, y, width, height): "
        "convert the boxes"
        if valid_as_xyxy.all()
        else "Check whether the annotations were made for images of another size"
    )
    return [
        Finding(Severity.WARNING, text, [f for f, out in zip(files, leaves, strict=True) if out])
    ]


def _small_box_findings(
    cfg: CfgNode, name: str, boxes: np.ndarray, sizes: np.ndarray, files: list[str]
) -> list[Finding]:
    short_sides = boxes[:, 2:].min(axis=1)
    scales = np.array([_scale(cfg, width, height) for width, height in sizes])
    resized = short_sides * scales
    small = (short_sides > 0) & (resized < MIN_SIDE) & (resized < short_sides)
    if not small.any():
        return []
    example = int(np.where(small, resized, np.inf).argmin())
    text = (
        f"{name}: {small.sum()} of {len(boxes)} boxes are smaller than {MIN_SIDE:g} pixels after "
        f"resizing, such as one of {short_sides[example]:g} pixels that becomes "
        f"{resized[example]:.2f}. Raise INPUT.MIN_SIZE_TEST and INPUT.MAX_SIZE_TEST (and the sizes "
        "for training), or cut the images into tiles"
    )
    return [Finding(Severity.WARNING, text, [f for f, s in zip(files, small, strict=True) if s])]


def _scale(cfg: CfgNode, width: float, height: float) -> float:
    """Factor of the resizing before inference."""
    if not (np.isfinite(width) and np.isfinite(height) and cfg.INPUT.MIN_SIZE_TEST > 0):
        return 1.0
    limits = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    new_height, _ = ResizeShortestEdge.get_output_shape(int(height), int(width), *limits)
    return new_height / height


def _repeated_box_findings(name: str, records: list[dict]) -> list[Finding]:
    repeated, total, example = [], 0, ""
    for record in records:
        boxes = Counter(
            (annotation["category_id"], str(annotation["bbox"]))
            for annotation in record.get("annotations", [])
            if not annotation.get("iscrowd", 0)
        )
        total += boxes.total()
        repeated += [record["file_name"]] * (boxes.total() - len(boxes))
        example = example or next((box for (_, box), n in boxes.items() if n > 1), "")
    if not repeated:
        return []
    text = (
        f"{name}: {len(repeated)} of {total} boxes repeat a box of the same class and image, such "
        f"as {example}. Training uses each copy, and evaluation counts it as a missed object: "
        "remove the copies"
    )
    return [Finding(Severity.WARNING, text, list(dict.fromkeys(repeated)))]


def _rotation_findings(name: str, records: list[dict]) -> list[Finding]:
    rotated = [
        record["file_name"]
        for record in records
        for annotation in record.get("annotations", [])
        if annotation.get("rotation")
    ]
    if not rotated:
        return []
    text = (
        f"{name}: {len(rotated)} boxes have a rotation, which is ignored: training and evaluation "
        "use the box as if it were upright. Export boxes without rotation"
    )
    return [Finding(Severity.WARNING, text, rotated)]


def _image_type_findings(cfg: CfgNode) -> list[Finding]:
    findings = []
    for name in cfg.DATASETS.UNLABELED:
        kind, _, folder = str(name).partition(":")
        folder = expand_path(folder)
        if kind != "folder" or not os.path.isdir(folder):
            continue
        files = list(_files_below(folder))
        suffixes = [os.path.splitext(file)[1].lower() for file in files]
        unread = [f for f, suffix in zip(files, suffixes, strict=True) if suffix in UNREAD_SUFFIXES]
        if unread:
            counts = Counter(os.path.splitext(file)[1].lower() for file in unread)
            types = ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common())
            images = sum(suffix in IMAGE_SUFFIXES for suffix in suffixes) + len(unread)
            text = (
                f"{name}: {len(unread)} of {images} images have a type that is not read ({types}); "
                "convert them to JPEG or PNG"
            )
            findings.append(Finding(Severity.WARNING, text, unread))
    return findings


def _files_below(folder: str) -> Iterator[str]:
    for parent, _, names in os.walk(folder):
        for name in sorted(names):
            if not is_companion(name):
                yield os.path.join(parent, name)


def _describe(box: np.ndarray) -> str:
    return "(" + ", ".join(f"{value:g}" for value in box) + ")"
