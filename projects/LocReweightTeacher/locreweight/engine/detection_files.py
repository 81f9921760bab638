"""Write detections to files: pictures, videos, crops, and annotations in several formats."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import cv2

from ..errors import UsageError
from ..visualization.drawing import DEFAULT_STYLE, DrawingStyle, save_picture
from .detections import Detections
from .inference import Frame, InputFile


class DetectionWriter(Protocol):
    """Receives the detections of one image or frame after the other."""

    def add(self, frame: Frame, detections: Detections) -> None:
        """Write or collect the detections of an image or frame."""

    def close(self) -> None:
        """Finish the files."""


class PictureWriter:
    """Writes images and videos with the detections drawn."""

    def __init__(self, folder: Path, style: DrawingStyle = DEFAULT_STYLE) -> None:
        """
        Args:
            folder: pictures are written to the ``name`` of each input in this folder.
            style: labels and line width.
        """
        self._folder, self._style = folder, style
        self._video: cv2.VideoWriter | None = None
        self._file: InputFile | None = None  # that the video is of

    def add(self, frame: Frame, detections: Detections) -> None:
        if frame.index is None:
            detections.save(self._folder / frame.file.name, self._style)
            return
        height, width = detections.image.shape[:2]
        if frame.file != self._file:
            self.close()
            self._file = frame.file
            self._video = self._open(self._folder / frame.file.name, frame.rate, (width, height))
        assert self._video is not None
        self._video.write(detections.draw(max(height, width), self._style)[:, :, ::-1])

    def close(self) -> None:
        if self._video is not None:
            self._video.release()

    def _open(self, file: Path, rate: float, size: tuple[int, int]) -> cv2.VideoWriter:
        file.parent.mkdir(parents=True, exist_ok=True)
        video = cv2.VideoWriter(str(file), cv2.VideoWriter.fourcc(*"mp4v"), rate, size)
        if not video.isOpened():
            raise UsageError(f"cannot write the video {file}: this OpenCV has no mp4 encoder")
        return video


class CropWriter:
    """Writes the part of the image inside each box, in a folder for each class."""

    def __init__(self, folder: Path) -> None:
        """
        Args:
            folder: the crops are called ``<class>/<image>-<number>.<suffix>``.
        """
        self._folder = folder

    def add(self, frame: Frame, detections: Detections) -> None:
        name = frame.file.name
        if frame.index is not None:
            name = name.with_name(f"{name.stem}-{frame.index}.jpg")
        for i, (label, crop) in enumerate(
            zip(detections.names, detections.crops(), strict=True), 1
        ):
            folder = self._folder / label.replace("/", "_") / name.parent
            save_picture(crop, folder / f"{name.stem}-{i}{name.suffix}")

    def close(self) -> None:
        pass


class CocoResults:
    """Detections in COCO's result format, with additional fields."""

    def __init__(self, file: Path) -> None:
        """
        Args:
            file: json file to write.
        """
        self._file = file
        self._num_images = 0
        self._entries: list[dict] = []

    def add(self, frame: Frame, detections: Detections) -> None:
        self._num_images += 1
        extra = {} if frame.index is None else {"frame": frame.index}
        for entry, name in zip(coco_entries(detections), detections.names, strict=True):
            source = {"file_name": str(frame.file), "category_name": name}
            self._entries.append({"image_id": self._num_images, **entry, **source, **extra})

    def close(self) -> None:
        _write_json(self._file, self._entries)


class CocoDataset:
    """A COCO annotation file of images and their detections.

    Boxes are xywh, absolute pixels of each image. Annotations also have ``score`` and
    ``localization_quality``.
    """

    def __init__(self, file: Path, class_names: list[str], root: Path) -> None:
        """
        Args:
            file: json file to write.
            class_names: become the categories 1, 2, ...
            root: folder that each ``file_name`` is relative to.
        """
        self._file = file
        self._root = root
        categories = [{"id": i, "name": name} for i, name in enumerate(class_names, 1)]
        self.content: dict[str, list[dict]] = {
            "images": [],
            "annotations": [],
            "categories": categories,
        }

    def add(self, frame: Frame, detections: Detections) -> None:
        images, annotations = self.content["images"], self.content["annotations"]
        height, width = detections.image.shape[:2]
        name = os.path.relpath(frame.file.path, self._root)
        image = {"id": len(images) + 1, "file_name": name, "width": width, "height": height}
        images.append(image)
        for entry in coco_entries(detections):
            area = round(entry["bbox"][2] * entry["bbox"][3], 2)
            ids = {"id": len(annotations) + 1, "image_id": image["id"]}
            annotations.append({**ids, **entry, "area": area, "iscrowd": 0})

    def close(self) -> None:
        _write_json(self._file, self.content)


class YoloLabels:
    """A YOLO label file for each image, and ``classes.txt``.

    ``yolo:<images>:<folder>`` reads them again, if the images are one input folder.
    """

    def __init__(self, folder: Path, class_names: list[str], files: Sequence[InputFile]) -> None:
        """
        Args:
            folder: the label files have the ``name`` of each input in this folder.
            class_names: in the order of their numbers.
            files: all images that will be added.

        Raises:
            UsageError: if two images would have the same label file, or one that of the class
                names. Nothing has been written then.
        """
        self._folder = folder
        self._class_names = class_names
        labels: dict[Path, InputFile] = {}
        for file in files:
            if file.name.with_suffix(".txt") == Path("classes.txt"):
                raise UsageError(f"the YOLO label file of {file} would be classes.txt: rename it")
            other = labels.setdefault(file.name.with_suffix(".txt"), file)
            if other != file:
                raise UsageError(
                    f"{other} and {file} would have the same YOLO label file: rename one of them"
                )

    def add(self, frame: Frame, detections: Detections) -> None:
        height, width = detections.image.shape[:2]
        file = self._folder / frame.file.name.with_suffix(".txt")
        file.parent.mkdir(parents=True, exist_ok=True)
        corners = detections.boxes / [width, height, width, height]
        boxes = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
        lines = [
            f"{label} {x:.6f} {y:.6f} {w:.6f} {h:.6f}\n"
            for label, (x, y), (w, h) in zip(detections.classes, *boxes, strict=True)
        ]
        file.write_text("".join(lines))

    def close(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        names = "".join(f"{name}\n" for name in self._class_names)
        (self._folder / "classes.txt").write_text(names)


class LabelStudioTasks:
    """Tasks for Label Studio whose predictions are the detections, and the labeling interface.

    Label Studio can only show images that are below its ``LOCAL_FILES_DOCUMENT_ROOT``.
    """

    def __init__(self, file: Path, class_names: list[str], root: Path, model: str) -> None:
        """
        Args:
            file: json file to import. The labeling interface is written beside it, as xml.
            class_names: the labels.
            root: folder that the address of each image is relative to.
            model: version of the model, shown by Label Studio.
        """
        self._file, self._class_names, self._root, self._model = file, class_names, root, model
        self._tasks: list[dict] = []

    def add(self, frame: Frame, detections: Detections) -> None:
        height, width = detections.image.shape[:2]
        boxes = 100 * detections.boxes / [width, height, width, height]
        shared = {
            "from_name": "label",
            "to_name": "image",
            "type": "rectanglelabels",
            "original_width": width,
            "original_height": height,
            "image_rotation": 0,
        }
        result = [
            {
                **shared,
                "id": str(i),
                "score": round(float(score), 5),
                "value": {
                    "x": x1,
                    "y": y1,
                    "width": x2 - x1,
                    "height": y2 - y1,
                    "rotation": 0,
                    "rectanglelabels": [name],
                },
            }
            for i, (name, score, (x1, y1, x2, y2)) in enumerate(
                zip(detections.names, detections.scores, boxes.tolist(), strict=True)
            )
        ]
        relative = Path(os.path.relpath(frame.file.path, self._root)).as_posix()
        path = quote(os.fsencode(relative))  # file names can contain bytes that are not UTF-8
        score = round(float(detections.scores.mean()), 5) if len(detections) else 0.0
        prediction = {"model_version": self._model, "score": score, "result": result}
        image = {"image": f"/data/local-files/?d={path}"}
        self._tasks.append({"data": image, "predictions": [prediction]})

    def close(self) -> None:
        _write_json(self._file, self._tasks)
        labels = "".join(f"    <Label value={quoteattr(name)}/>\n" for name in self._class_names)
        self._file.with_suffix(".xml").write_text(
            '<View>\n  <Image name="image" value="$image"/>\n'
            f'  <RectangleLabels name="label" toName="image">\n{labels}  </RectangleLabels>\n'
            "</View>\n"
        )


def coco_entries(detections: Detections) -> Iterator[dict]:
    """Yield category, box (xywh, absolute pixels), score and localization quality in COCO format.

    Categories are counted from 1. The localization quality is None if the detector was not trained
    to predict it.
    """
    quality = detections.localization_quality
    for i, (x1, y1, x2, y2) in enumerate(detections.boxes.tolist()):
        yield {
            "category_id": int(detections.classes[i]) + 1,
            "bbox": [round(v, 2) for v in (x1, y1, x2 - x1, y2 - y1)],
            "score": round(float(detections.scores[i]), 5),
            "localization_quality": None if quality is None else round(float(quality[i]), 5),
        }


def common_folder(files: Iterable[Path]) -> Path:
    """Return the deepest folder that contains all files."""
    return Path(os.path.commonpath([file.absolute().parent for file in files]))


def _write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        file.write_text(json.dumps(content))
    except OSError as error:
        error.filename = str(file)  # errors of a full disk do not name it
        raise
