"""Apply a detector to files: pictures and videos with detections, COCO results, pseudo-labels."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from detectron2.structures import Instances
from tqdm import tqdm

from ..data.training_sets import load_training_sets, register_datasets
from ..errors import UsageError
from ..visualization.drawing import DEFAULT_STYLE, DrawingStyle, draw_detections, save_picture
from .inference import ImageDetections, InputFile, detect_in_files
from .predictor import Predictor

_SMALLEST_SIDE = 480  # smaller images are enlarged so that labels are readable
_DEFAULT_FPS = 25.0  # for videos without a frame rate


@dataclass
class CocoResults:
    """Detections in COCO's result format, with additional fields."""

    class_names: list[str]
    has_localization_quality: bool
    num_images: int = 0
    entries: list[dict] = field(default_factory=list)

    def add(self, file: Path, detections: Instances, **extra_fields: int) -> None:
        """Add the detections of the next image; ``extra_fields`` are added to each entry."""
        self.num_images += 1
        for entry in coco_entries(
            detections, has_localization_quality=self.has_localization_quality
        ):
            self.entries.append(
                {
                    "image_id": self.num_images,
                    **entry,
                    "file_name": str(file),
                    "category_name": self.class_names[entry["category_id"] - 1],
                    **extra_fields,
                }
            )


def coco_entries(detections: Instances, *, has_localization_quality: bool) -> Iterator[dict]:
    """Yield category, box (xywh, absolute pixels), score and localization quality in COCO format.

    Args:
        detections: of one image. Categories are counted from 1.
        has_localization_quality: if False, ``localization_quality`` is None.
    """
    for (x1, y1, x2, y2), label, score, quality in zip(
        detections.pred_boxes.tensor.tolist(),
        detections.pred_classes.tolist(),
        detections.scores.tolist(),
        detections.localization_quality.tolist(),
        strict=True,
    ):
        yield {
            "category_id": label + 1,
            "bbox": [round(v, 2) for v in (x1, y1, x2 - x1, y2 - y1)],
            "score": round(score, 5),
            "localization_quality": round(quality, 5) if has_localization_quality else None,
        }


def predict_files(
    detector: Predictor,
    files: list[InputFile],
    output: Path,
    threshold: float,
    batch: int,
    style: DrawingStyle = DEFAULT_STYLE,
) -> tuple[CocoResults, list[str]]:
    """Detect objects in images and videos, draw them and collect them.

    Args:
        detector: trained detector.
        files: images and videos.
        output: folder for the pictures.
        threshold: detections above this score are kept.
        batch: number of images per batch.
        style: labels and line width.

    Returns:
        the detections, and a message for each file that could not be read.
    """
    results = CocoResults(detector.class_names, detector.has_localization_quality)
    unreadable: list[str] = []
    images = [file for file in files if not file.is_video]
    for image in detect_in_files(detector, images, batch, unreadable):
        detections = image.detections[image.detections.scores > threshold]
        side = max(_SMALLEST_SIDE, *image.image.shape[:2])
        picture = _draw(detector, image.image, detections, side, style)
        save_picture(picture, output / image.file.name)
        results.add(image.file.path, detections)
    for file in (file for file in files if file.is_video):
        try:
            _predict_video(detector, file, output, threshold, batch, results, style)
        except OSError as error:
            unreadable.append(f"{file.path}: {error}")
    return results, unreadable


def unlabeled_files(detector: Predictor) -> list[InputFile]:
    """Return the unlabeled images of the detector's config.

    Raises:
        UsageError: if a dataset does not exist, or the config has no unlabeled images.
    """
    register_datasets(detector.cfg)
    records = load_training_sets(detector.cfg).unlabeled
    if not records:
        raise UsageError("the checkpoint's config has no unlabeled images: give --input")
    return [InputFile(Path(r["file_name"]), Path(r["file_name"])) for r in records]


def pseudo_label_dataset(
    images: Iterable[ImageDetections], detector: Predictor, threshold: float, root: Path
) -> dict:
    """Return the content of a COCO annotation file with pseudo-labels.

    Args:
        images: detections of the detector.
        detector: gives class names.
        threshold: detections above this score are pseudo-labels.
        root: folder that each ``file_name`` is relative to.

    Returns:
        ``images``, ``annotations`` and ``categories``. Boxes are xywh, absolute pixels of each
        image. Annotations also have ``score`` and ``localization_quality``.
    """
    image_entries: list[dict] = []
    annotations: list[dict] = []
    for image in images:
        height, width = image.image.shape[:2]
        name = os.path.relpath(image.file.path, root)
        image_id = len(image_entries) + 1
        image_entries.append({"id": image_id, "file_name": name, "width": width, "height": height})
        pseudo_labels = image.detections[image.detections.scores > threshold]
        for entry in coco_entries(
            pseudo_labels, has_localization_quality=detector.has_localization_quality
        ):
            area = round(entry["bbox"][2] * entry["bbox"][3], 2)
            ids = {"id": len(annotations) + 1, "image_id": image_id}
            annotations.append({**ids, **entry, "area": area, "iscrowd": 0})
    categories = [{"id": i, "name": name} for i, name in enumerate(detector.class_names, 1)]
    return {"images": image_entries, "annotations": annotations, "categories": categories}


def common_folder(files: Iterable[InputFile]) -> Path:
    """Return the deepest folder that contains all files."""
    return Path(os.path.commonpath([file.path.absolute().parent for file in files]))


def _draw(
    detector: Predictor, image: np.ndarray, detections: Instances, side: int, style: DrawingStyle
) -> np.ndarray:
    names, quality = detector.class_names, detector.has_localization_quality
    return draw_detections(image, detections, names, side, quality=quality, style=style)


def _predict_video(
    detector: Predictor,
    file: InputFile,
    output: Path,
    threshold: float,
    batch: int,
    results: CocoResults,
    style: DrawingStyle,
) -> None:
    """Write a video with the detections of each frame as mp4.

    Raises:
        OSError: if OpenCV cannot read the video.
        UsageError: if OpenCV cannot write it.
    """
    video = cv2.VideoCapture(str(file.path))
    try:
        frames = _read_frames(video)
        first = next(frames, None)
        if first is None:
            raise OSError("no frame can be decoded")
        target = output / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        size = (first.shape[1], first.shape[0])
        rate = video.get(cv2.CAP_PROP_FPS) or _DEFAULT_FPS
        writer = cv2.VideoWriter(str(target), cv2.VideoWriter.fourcc(*"mp4v"), rate, size)
        if not writer.isOpened():
            raise UsageError(f"cannot write the video {target}: this OpenCV has no mp4 encoder")
        total = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
        bar = tqdm(total=max(total, 0) or None, desc=file.path.name, disable=None)
        group, index = [first], 0
        while group:
            while len(group) < batch and (frame := next(frames, None)) is not None:
                group.append(frame)
            for frame, found in zip(group, detector.detect(group), strict=True):
                detections = found[found.scores > threshold]
                picture = _draw(detector, frame, detections, max(size), style)
                writer.write(picture[:, :, ::-1])
                results.add(file.path, detections, frame=index)
                index += 1
            bar.update(len(group))
            following = next(frames, None)
            group = [] if following is None else [following]
        bar.close()
        writer.release()
    finally:
        video.release()


def _read_frames(video: cv2.VideoCapture) -> Iterator[np.ndarray]:
    """Yield all frames, ``(H, W, 3)`` uint8 RGB."""
    while True:
        success, frame = video.read()
        if not success:
            return
        yield np.ascontiguousarray(frame[:, :, ::-1])
