"""On which annotated images a detector does best, and on which worst."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from compare_detections import draw_truth
from predict import draw_detections

from ..data.image_io import read_rgb
from ..data.monitored import ground_truth_in_view
from ..engine.matching import agreement, match
from ..engine.predictor import Predictor
from .drawing import captioned, grid

SIDE = 320  # pixels of a picture's longer side


@dataclass(frozen=True)
class RankedImage:
    """How well the detections of an image agree with its truth.

    Attributes:
        record: of the image.
        f1: harmonic mean of precision and recall at IoU 0.5.
        mean_iou: of the detections that are right; 0 without any.
        errors: detections that are wrong, and objects that were not found.
    """

    record: dict
    f1: float
    mean_iou: float
    errors: int


def rank(detector: Predictor, records: Sequence[dict], threshold: float) -> list[RankedImage]:
    """Images from the best to the worst; those with neither truth nor detections are left out.

    Args:
        detector: a trained one.
        records: annotated.
        threshold: least score of a detection.
    """
    ranked = []
    for record in tqdm(records, desc="best and worst", disable=None):
        image = read_rgb(record["file_name"])
        (found,) = detector.detect([image])
        truth = ground_truth_in_view(record, torch.eye(3), image.shape[:2])
        matched = match(found[found.scores > threshold], truth)
        total = len(matched.right) + matched.num_truth
        if not total:
            continue
        right = int(matched.right.sum())
        f1 = 2 * right / total
        mean_iou = agreement(matched).mean_iou if f1 else 0.0
        ranked.append(RankedImage(record, f1, mean_iou, total - 2 * right))
    return sorted(ranked, key=lambda one: (one.f1, one.mean_iou, -one.errors), reverse=True)


def draw_ranked(detector: Predictor, image: RankedImage, threshold: float) -> np.ndarray:
    """Ground truth | detections of one image, RGB."""
    pixels = read_rgb(image.record["file_name"])
    (found,) = detector.detect([pixels])
    truth = draw_truth(pixels, image.record, detector.class_names, SIDE)
    drawn = draw_detections(pixels, found[found.scores > threshold], detector, SIDE)
    return grid([[captioned(truth, "ground truth"), captioned(drawn, "detections")]])
