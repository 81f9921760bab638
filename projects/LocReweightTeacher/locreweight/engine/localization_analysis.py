"""Each detection of a model on annotated images beside what it should have been.

Shapes:

    D: detections of all images together
    M: those of them that found an object of their class, with IoU at least 0.5
"""

from __future__ import annotations

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
from .predictor import Predictor


@dataclass(frozen=True)
class Localization:
    """What was predicted of boxes, and what is true.

    Attributes:
        score: ``(D,)`` foreground score.
        quality: ``(D,)`` localization quality (Eq. 5).
        iou: ``(D,)`` with the ground truth box that overlaps most, of whatever class.
        variance: ``(M, 4)`` predicted, in the squared units of the box coding.
        error: ``(M, 4)`` of the coded box, true minus predicted.
    """

    score: np.ndarray
    quality: np.ndarray
    iou: np.ndarray
    variance: np.ndarray
    error: np.ndarray


@dataclass(frozen=True)
class Correlation:
    """Of IoU with another number over some detections; NaN where one of them does not vary."""

    pearson: float
    spearman: float
    count: int


def correlation(iou: np.ndarray, other: np.ndarray) -> Correlation:
    """Pearson's and Spearman's coefficient of two arrays ``(D,)``."""
    if len(iou) < 3 or np.ptp(iou) == 0 or np.ptp(other) == 0:
        return Correlation(float("nan"), float("nan"), len(iou))
    pearson, spearman = pearsonr(iou, other).statistic, spearmanr(iou, other).statistic
    return Correlation(float(pearson), float(spearman), len(iou))


@dataclass(frozen=True)
class Calibration:
    """Coordinates in groups of equal size, by their predicted variance: means of each group.

    Attributes:
        variance: predicted.
        squared_error: what the variance of a Gaussian would be equal to.
        fitted_error: what the KL loss fits it to: the squared error up to 1, beyond
            ``2 * |error| - 1`` (Eq. 8 and 9).
    """

    variance: np.ndarray
    squared_error: np.ndarray
    fitted_error: np.ndarray


def calibration(variance: np.ndarray, error: np.ndarray, groups: int = 10) -> Calibration:
    """Predicted variance against actual error.

    Args:
        variance, error: ``(M, 4)``, of :class:`Localization`.
        groups: at most; fewer if there are fewer coordinates.
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
    """Records of an annotated data set whose classes are the detector's.

    Args:
        detector: whose config names the data set, if ``name`` is empty: the first one to test on.
        name: of the data set, as in the config.
        count: so many at most, the first ones.

    Raises:
        UsageError: for a data set that is not there, or not annotated with these classes.
    """
    if not name and not detector.cfg.DATASETS.TEST:
        raise UsageError("the config of the checkpoint has no DATASETS.TEST: name a --dataset")
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
    """All detections on annotated images, with a progress bar on a terminal.

    Raises:
        UsageError: if the detector does not measure localization quality, or finds nothing.
    """
    if not detector.has_localization_quality:
        raise UsageError("this is a plain Detectron2 detector: it predicts no localization quality")
    parts = [
        _localize_one(detector, record)
        for record in tqdm(records, desc="localization", disable=None)
    ]
    joined = [np.concatenate(column) for column in zip(*parts, strict=True)]
    if not joined or not len(joined[0]):
        raise UsageError("the checkpoint finds nothing in these images")
    return Localization(*joined)


def _localize_one(detector: Predictor, record: dict) -> tuple[np.ndarray, ...]:
    """The fields of :class:`Localization` of one image, in the frame of the model's input."""
    model = detector.model
    inputs = detector.model_input(read_rgb(record["file_name"]))
    images = model.preprocess_image([inputs])
    features = model.backbone(images.tensor)
    proposals, _ = model.proposal_generator(images, features, None)
    boxes = [p.proposal_boxes for p in proposals]
    predictions = model.roi_heads.predict(features, boxes)
    # What is not finite would be left out, and rows no longer be those of the proposals.
    if not all(values.isfinite().all() for values in predictions):
        raise UsageError(f"the checkpoint predicts NaN or infinity for {record['file_name']}")
    (found,), (rows,) = model.roi_heads.box_predictor.inference(predictions, proposals)

    height, width = images.image_sizes[0]
    scale = torch.diag(torch.tensor([width / inputs["width"], height / inputs["height"], 1.0]))
    truth = ground_truth_in_view(record, scale, (height, width)).to(found.pred_boxes.device)
    iou = pairwise_iou(found.pred_boxes, truth.gt_boxes)
    best = iou.max(dim=1).values if len(truth) else torch.zeros(len(found))
    variance, error = _coded(detector, predictions, boxes[0].tensor, found, rows, truth, iou)
    columns = (found.scores, found.localization_quality, best, variance, error)
    return tuple(column.cpu().numpy() for column in columns)


def _coded(
    detector: Predictor,
    predictions: BoxPredictions,
    proposals: Tensor,
    found: Instances,
    rows: Tensor,
    truth: Instances,
    iou: Tensor,
) -> tuple[Tensor, Tensor]:
    """``(M, 4)`` variances and errors of the detections that found an object of their class."""
    predictor = detector.model.roi_heads.box_predictor
    same_class = iou * (found.pred_classes[:, None] == truth.gt_classes[None])
    if not len(truth):
        return proposals.new_zeros(0, 4), proposals.new_zeros(0, 4)
    overlap, partner = same_class.max(dim=1)
    hit = overlap >= IOU_THRESHOLD
    rows, partner, classes = rows[hit], partner[hit], found.pred_classes[hit]
    target = predictor.box2box_transform.get_deltas(proposals[rows], truth.gt_boxes.tensor[partner])

    def of_class(values: Tensor) -> Tensor:
        values = values[rows].unflatten(1, (-1, 4))
        column = classes if values.shape[1] > 1 else torch.zeros_like(classes)
        return values[torch.arange(len(values), device=values.device), column]

    limit = predictor.log_variance_limit
    variance = of_class(predictions.log_variance).clamp(-limit, limit).exp()
    return variance, target - of_class(predictions.deltas)
