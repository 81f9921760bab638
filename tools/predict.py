#!/usr/bin/env python
"""Find objects in images and videos with a checkpoint: pictures, and json if you like.

    python tools/predict.py --weights output/mine/model_best.pth \\
        --input photos --output found --json found.json

A checkpoint that train_net.py wrote says itself how it was trained and what its classes are called.
Pictures show class, score and localization quality of each box. The json is a list in COCO's result
format: ``image_id`` counts the images from 1, ``category_id`` the classes from 1, ``bbox`` is
(x, y, width, height) in pixels of the image; ``file_name``, ``category_name``,
``localization_quality`` (null for a plain Detectron2 detector) and, in videos, ``frame`` (from 0)
are beside these. Files that cannot be read are skipped, named at the end, and make the exit code 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from detectron2.structures import Instances
from tqdm import tqdm

from locreweight.engine.inference import (
    INPUT_HELP,
    InputFile,
    detect_in_files,
    exit_if_unreadable,
    find_inputs,
)
from locreweight.engine.predictor import Predictor, load_predictor
from locreweight.errors import UsageError
from locreweight.visualization.drawing import (
    Layer,
    class_colors,
    detection_labels,
    draw,
    save_picture,
)

SHORTEST_SIDE = 480  # of the longer sides: smaller images are enlarged, for labels to be read


@dataclass
class Results:
    """Detections in COCO's result format, as they come in."""

    class_names: list[str]
    has_localization_quality: bool
    images: int = 0
    entries: list[dict] = field(default_factory=list)

    def add(self, file: Path, found: Instances, **more: int) -> None:
        """Those of one more image; ``more`` goes into each entry."""
        self.images += 1
        for (x1, y1, x2, y2), label, score, quality in zip(
            found.pred_boxes.tensor.tolist(),
            found.pred_classes.tolist(),
            found.scores.tolist(),
            found.localization_quality.tolist(),
            strict=True,
        ):
            self.entries.append(
                {
                    "image_id": self.images,
                    "category_id": label + 1,
                    "bbox": [round(v, 2) for v in (x1, y1, x2 - x1, y2 - y1)],
                    "score": round(score, 5),
                    "file_name": str(file),
                    "category_name": self.class_names[label],
                    "localization_quality": round(quality, 5)
                    if self.has_localization_quality
                    else None,
                    **more,
                }
            )


def draw_detections(
    image: np.ndarray, found: Instances, detector: Predictor, side: int
) -> np.ndarray:
    """An image with boxes in the colors of their classes, and what the detector says of them.

    Args:
        image: ``(H, W, 3)`` uint8 RGB.
        found: in pixels of the image.
        detector: that found them.
        side: longer side of the picture.
    """
    labels = detection_labels(
        found, detector.class_names, quality=detector.has_localization_quality
    )
    layer = Layer(found.pred_boxes.tensor, class_colors(found.pred_classes), labels)
    return draw(image, [layer], side)


def predict_video(
    detector: Predictor,
    file: InputFile,
    output: Path,
    threshold: float,
    batch: int,
    results: Results,
) -> None:
    """Write a video with the detections of each frame drawn into it, as mp4.

    Raises:
        OSError: if it is no video that OpenCV can read.
    """
    video = cv2.VideoCapture(str(file.path))
    try:
        frames = _frames(video)
        first = next(frames, None)
        if first is None:
            raise OSError("no frame can be decoded")
        target = output / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        size = (first.shape[1], first.shape[0])
        rate = video.get(cv2.CAP_PROP_FPS) or 25.0
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
                chosen = found[found.scores > threshold]
                picture = draw_detections(frame, chosen, detector, max(size))
                writer.write(picture[:, :, ::-1])
                results.add(file.path, chosen, frame=index)
                index += 1
            bar.update(len(group))
            following = next(frames, None)
            group = [] if following is None else [following]
        bar.close()
        writer.release()
    finally:
        video.release()


def _frames(video: cv2.VideoCapture) -> Iterator[np.ndarray]:
    """RGB frames to the end."""
    while True:
        read, frame = video.read()
        if not read:
            return
        yield np.ascontiguousarray(frame[:, :, ::-1])


def predict(
    detector: Predictor, files: list[InputFile], output: Path, threshold: float, batch: int
) -> tuple[Results, list[str]]:
    """Draw the detections in all files, and collect them.

    Args:
        detector: a trained one.
        files: images and videos.
        output: folder for the pictures.
        threshold: least score of a detection.
        batch: so many images go through the model at a time.

    Returns:
        the detections, and a line for each file that could not be read.
    """
    results = Results(detector.class_names, detector.has_localization_quality)
    unreadable: list[str] = []
    images = [file for file in files if not file.is_video]
    for seen in detect_in_files(detector, images, batch, unreadable):
        chosen = seen.detections[seen.detections.scores > threshold]
        side = max(SHORTEST_SIDE, *seen.image.shape[:2])
        picture = draw_detections(seen.image, chosen, detector, side)
        save_picture(picture, output / seen.file.name)
        results.add(seen.file.path, chosen)
    for file in (file for file in files if file.is_video):
        try:
            predict_video(detector, file, output, threshold, batch, results)
        except OSError as error:
            unreadable.append(f"{file.path}: {error}")
    return results, unreadable


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments by which all tools open a checkpoint."""
    parser.add_argument("--weights", required=True, help="a checkpoint, or an OUTPUT_DIR")
    parser.add_argument("--config-file", default="", help="for checkpoints that do not say it")
    parser.add_argument("--device", default="", help="cuda or cpu; a GPU is used if there is one")
    parser.add_argument("--batch", type=int, default=0, help="images at a time: 8 on a GPU, else 1")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_checkpoint_arguments(parser)
    parser.add_argument("--input", nargs="+", required=True, help=f"{INPUT_HELP}; videos too")
    parser.add_argument("--output", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--json", type=Path, help="write all detections into this file")
    parser.add_argument("--threshold", type=float, default=0.5, help="least score")
    parser.add_argument("--count", type=int, help="look at so many files at most")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs of the config")
    args = parser.parse_args()
    try:
        files = find_inputs(args.input, args.output)[: args.count]
        detector = load_predictor(args.weights, args.config_file, args.opts, args.device)
        batch = args.batch or detector.default_batch_size
        results, unreadable = predict(detector, files, args.output, args.threshold, batch)
    except UsageError as error:
        sys.exit(f"error: {error}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results.entries))
    print(f"{len(results.entries)} detections in {results.images} images: {args.output}")
    exit_if_unreadable(unreadable, len(files))


if __name__ == "__main__":
    main()
