"""Draw the detections of one or several detectors beside the ground truth, and rank images."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from ..data.image_io import read_rgb
from ..data.monitored import ground_truth_in_view
from ..engine.inference import find_inputs
from ..engine.matching import agreement, match
from ..engine.predictor import Predictor
from ..errors import UsageError
from .drawing import captioned, draw_detections, draw_ground_truth, grid


@dataclass(frozen=True)
class RankedImage:
    """Agreement of the detections in an image with its ground truth.

    Attributes:
        record: dataset record of the image.
        f1: harmonic mean of precision and recall at IoU 0.5.
        mean_iou: mean IoU of the correct detections; 0 without any.
        errors: number of wrong detections and missed objects.
    """

    record: dict
    f1: float
    mean_iou: float
    errors: int


def rank_images(
    detector: Predictor, records: Sequence[dict], threshold: float
) -> list[RankedImage]:
    """Sort images by F1, best first. Images without ground truth and detections are left out.

    Args:
        detector: is run on all images, with a progress bar on a terminal.
        records: annotated dataset records.
        threshold: detections above this score count.
    """
    ranked = []
    for record in tqdm(records, desc="best and worst", disable=None):
        image = read_rgb(record["file_name"])
        (detections,) = detector.detect([image])
        ground_truth = ground_truth_in_view(record, torch.eye(3), image.shape[:2])
        matched = match(detections[detections.scores > threshold], ground_truth)
        total = len(matched.is_correct) + matched.num_ground_truth
        if not total:
            continue
        num_correct = int(matched.is_correct.sum())
        f1 = 2 * num_correct / total
        mean_iou = agreement(matched).mean_iou if f1 else 0.0
        ranked.append(RankedImage(record, f1, mean_iou, total - 2 * num_correct))
    return sorted(ranked, key=lambda image: (image.f1, image.mean_iou, -image.errors), reverse=True)


def draw_comparison(
    detectors: Mapping[str, Predictor], records: Sequence[dict], threshold: float, side: int
) -> np.ndarray:
    """Draw one row per image: its ground truth and the detections of each detector.

    Args:
        detectors: caption -> detector. All have the same classes.
        records: annotated dataset records.
        threshold: detections above this score are drawn.
        side: longer side of each image in the picture, in pixels.

    Returns:
        ``(H, W, 3)`` uint8, RGB.
    """
    rows = []
    class_names = next(iter(detectors.values())).class_names
    for record in records:
        image = read_rgb(record["file_name"])
        ground_truth = ground_truth_in_view(record, torch.eye(3), image.shape[:2])
        picture = draw_ground_truth(image, ground_truth, class_names, side)
        cells = [captioned(picture, "ground truth")]
        for name, detector in detectors.items():
            (detections,) = detector.detect([image])
            picture = draw_detections(
                image,
                detections[detections.scores > threshold],
                class_names,
                side,
                quality=detector.has_localization_quality,
            )
            cells.append(captioned(picture, name))
        rows.append(cells)
    return grid(rows)


def select_annotated(records: list[dict], inputs: Sequence[str], count: int) -> list[dict]:
    """Return the records of the given images, or the first records without ``inputs``.

    Args:
        records: dataset records.
        inputs: image files, folders or patterns.
        count: largest number of records.

    Raises:
        UsageError: for an image that is not in the dataset.
    """
    if not inputs:
        return records[:count]
    by_path = {os.path.realpath(record["file_name"]): record for record in records}
    selected = []
    for file in find_inputs(inputs)[:count]:
        record = by_path.get(os.path.realpath(file.path))
        if record is None:
            raise UsageError(f"{file.path} is not in the data set: give the right --dataset")
        selected.append(record)
    return selected
