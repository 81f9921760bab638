"""Measure how well the localization quality of detections predicts their IoU.

Shapes:

    D: detections of all images together
    M: detections with an IoU of at least 0.5 with an object of their class
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Instances, pairwise_iou
from scipy.stats import pearsonr, spearmanr
from torch import Tensor
from tqdm import tqdm

from ..data.checks import (
    check_boxes,
    check_classes,
    check_images_decode,
    check_images_exist,
)
from ..data.datasets.catalog import register
from ..data.image_io import read_rgb
from ..data.monitored import ground_truth_in_view
from ..errors import UsageError
from ..modeling import BoxPredictions
from .matching import IOU_THRESHOLD
from .predictor import Predictor, model_input


@dataclass(frozen=True)
class Localization:
    """Predictions of all detections, compared with the ground truth.

    Attributes:
        score: ``(D,)`` foreground score.
        quality: ``(D,)`` localization quality (Eq. 5).
        iou: ``(D,)`` IoU with the ground truth box of any class that overlaps most.
        variance: ``(M, 4)`` predicted variance, in the squared units of the box coding.
        error: ``(M, 4)`` true minus predicted box deltas, in the units of the box coding.
    """

    score: np.ndarray
    quality: np.ndarray
    iou: np.ndarray
    variance: np.ndarray
    error: np.ndarray


@dataclass(frozen=True)
class Correlation:
    """Correlation of IoU with another value; NaN if one of the two is constant."""

    pearson: float
    spearman: float
    count: int


def correlation(iou: np.ndarray, other: np.ndarray) -> Correlation:
    """Return Pearson's and Spearman's coefficient of two arrays ``(D,)``."""
    if len(iou) < 3 or np.ptp(iou) == 0 or np.ptp(other) == 0:
        return Correlation(float("nan"), float("nan"), len(iou))
    pearson, spearman = pearsonr(iou, other).statistic, spearmanr(iou, other).statistic
    return Correlation(float(pearson), float(spearman), len(iou))


def partial_correlation(iou: np.ndarray, other: np.ndarray, given: np.ndarray) -> Correlation:
    """Return the partial correlation of two arrays ``(D,)``, with a third one held constant.

    It is 0 if ``other`` adds nothing to a linear prediction of ``iou`` from ``given``.
    """
    pairs = correlation(iou, other), correlation(iou, given), correlation(other, given)

    def coefficient(direct: float, first: float, second: float) -> float:
        rest = (1 - first**2) * (1 - second**2)
        return (direct - first * second) / math.sqrt(rest) if rest > 1e-12 else math.nan

    return Correlation(
        coefficient(*(pair.pearson for pair in pairs)),
        coefficient(*(pair.spearman for pair in pairs)),
        len(iou),
    )


def correlations(data: Localization, threshold: float) -> dict[str, Correlation]:
    """Correlate IoU with score and with quality in several groups of detections.

    Args:
        data: all detections.
        threshold: detections above this score would be pseudo-labels.

    Returns:
        "score", "quality" and "quality at equal score" (a partial correlation), each over all
        detections, over would-be pseudo-labels, and over detections with an IoU of at least 0.5.
        The last group excludes detections of objects that the ground truth lacks.
    """
    groups = {
        "all": np.full(len(data.iou), True),
        "pseudo-labels": data.score > threshold,
        "on objects": data.iou >= IOU_THRESHOLD,
    }
    result = {}
    for group, selected in groups.items():
        iou, score, quality = (x[selected] for x in (data.iou, data.score, data.quality))
        result[f"score, {group}"] = correlation(iou, score)
        result[f"quality, {group}"] = correlation(iou, quality)
        result[f"quality at equal score, {group}"] = partial_correlation(iou, quality, score)
    return result


@dataclass(frozen=True)
class Calibration:
    """Means over groups of coordinates with similar predicted variance.

    Attributes:
        variance: mean predicted variance.
        squared_error: mean squared error; equal to the variance if that is calibrated.
        fitted_error: mean of the error to which the KL loss fits the variance: the squared error
            where the absolute error is <= 1, ``2 * |error| - 1`` beyond (Eq. 8 and 9).
    """

    variance: np.ndarray
    squared_error: np.ndarray
    fitted_error: np.ndarray


def calibration(variance: np.ndarray, error: np.ndarray, groups: int = 10) -> Calibration:
    """Compare predicted variances with actual errors.

    Args:
        variance, error: ``(M, 4)``, see :class:`Localization`.
        groups: number of groups of equal size; fewer if there are fewer coordinates.
    """
    variance, size = variance.ravel(), np.abs(error.ravel())
    order = np.argsort(variance, kind="stable")
    parts = [p for p in np.array_split(order, groups) if len(p)]
    fitted = np.where(size <= 1, size**2, 2 * size - 1)
    means = [
        np.array([values[part].mean() for part in parts]) for values in (variance, size**2, fitted)
    ]
    return Calibration(*means)


def annotated_records(detector: Predictor, name: str, count: int | None = None) -> list[dict]:
    """Load the records of a dataset that is annotated with the detector's classes.

    Args:
        detector: checked against the dataset.
        name: name of the dataset, as in a config; if empty, the first of the detector's
            ``DATASETS.TEST``.
        count: largest number of records; the first ones are used.

    Raises:
        UsageError: if the dataset does not exist or has other classes.
    """
    if not name and not detector.cfg.DATASETS.TEST:
        raise UsageError("the checkpoint's config has no DATASETS.TEST: give a --dataset")
    name = name or detector.cfg.DATASETS.TEST[0]
    settings = detector.cfg.DATASETS
    register([name], settings.CLASS_NAMES, allow_outside=settings.CHECKS.ALLOW_OUTSIDE_PATHS)
    records = DatasetCatalog.get(name)
    classes = list(MetadataCatalog.get(name).get("thing_classes", []))
    check_classes({"the checkpoint": detector.class_names, name: classes}, len(classes))
    chosen = check_boxes(records[:count], drop_bad=settings.CHECKS.DROP_BAD_BOXES)
    check_images_exist(chosen)
    if settings.CHECKS.DECODE_IMAGES:
        check_images_decode(chosen)
    return chosen


@torch.no_grad()
def localize(detector: Predictor, records: Sequence[dict]) -> Localization:
    """Compare all detections in annotated images with the ground truth.

    Shows a progress bar on a terminal.

    Raises:
        UsageError: if the detector has no localization quality, predicts NaN, or detects nothing.
    """
    if not detector.has_localization_quality:
        raise UsageError(
            "the model was not trained to predict localization quality: it is a plain Detectron2 "
            "detector, or its config has MODEL.ROI_BOX_HEAD.GAUSSIAN_BOXES False"
        )
    parts = [
        _localize_one(detector, record)
        for record in tqdm(records, desc="localization", disable=None)
    ]
    joined = [np.concatenate(column) for column in zip(*parts, strict=True)]
    if not joined or not len(joined[0]):
        raise UsageError("the checkpoint detects nothing in these images")
    return Localization(*joined)


def _localize_one(detector: Predictor, record: dict) -> tuple[np.ndarray, ...]:
    """Return the fields of :class:`Localization` for one image, in the frame of the model input."""
    model = detector.model
    inputs = model_input(detector.cfg, read_rgb(record["file_name"]))
    images = model.preprocess_image([inputs])
    features = model.backbone(images.tensor)
    proposals, _ = model.proposal_generator(images, features, None)
    boxes = [p.proposal_boxes for p in proposals]
    predictions = model.roi_heads.predict(features, boxes)
    # Inference drops predictions that are not finite. The rows would no longer index proposals.
    if not all(values.isfinite().all() for values in predictions):
        raise UsageError(f"the checkpoint predicts NaN or infinity for {record['file_name']}")
    (detections,), (rows,) = model.roi_heads.box_predictor.inference(
        predictions, proposals, voting=False
    )

    height, width = images.image_sizes[0]
    scale = torch.diag(torch.tensor([width / inputs["width"], height / inputs["height"], 1.0]))
    ground_truth = ground_truth_in_view(record, scale, (height, width))
    ground_truth = ground_truth.to(detections.pred_boxes.device)
    iou = pairwise_iou(detections.pred_boxes, ground_truth.gt_boxes)
    best = iou.max(dim=1).values if len(ground_truth) else torch.zeros(len(detections))
    variance, error = _variances_and_errors(
        detector, predictions, boxes[0].tensor, detections, rows, ground_truth, iou
    )
    columns = (detections.scores, detections.localization_quality, best, variance, error)
    return tuple(column.cpu().numpy() for column in columns)


def _variances_and_errors(
    detector: Predictor,
    predictions: BoxPredictions,
    proposals: Tensor,
    detections: Instances,
    rows: Tensor,
    ground_truth: Instances,
    iou: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return ``(M, 4)`` variances and errors of detections that match an object of their class."""
    predictor = detector.model.roi_heads.box_predictor
    same_class = iou * (detections.pred_classes[:, None] == ground_truth.gt_classes[None])
    if not len(ground_truth):
        return proposals.new_zeros(0, 4), proposals.new_zeros(0, 4)
    overlap, match = same_class.max(dim=1)
    is_match = overlap >= IOU_THRESHOLD
    rows, match, classes = rows[is_match], match[is_match], detections.pred_classes[is_match]
    target = predictor.box2box_transform.get_deltas(
        proposals[rows], ground_truth.gt_boxes.tensor[match]
    )

    def of_class(values: Tensor) -> Tensor:
        values = values[rows].unflatten(1, (-1, 4))
        column = classes if values.shape[1] > 1 else torch.zeros_like(classes)
        return values[torch.arange(len(values), device=values.device), column]

    limit = predictor.log_variance_limit
    variance = of_class(predictions.log_variance).clamp(-limit, limit).exp()
    return variance, target - of_class(predictions.deltas)
