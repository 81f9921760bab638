"""Suggest which unlabeled images a person should label next.

An image is worth labeling if the detector is uncertain about it: about the classes of its objects,
about their boxes, or because it finds other objects in the mirrored image. The suggested images
also differ from each other and from the labeled ones, as measured by the features of the backbone.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from math import ceil
from pathlib import Path

import numpy as np
import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, Instances
from scipy.stats import rankdata

from .inference import InputFile, read_images
from .matching import match
from .predictor import Predictor, model_input

MIN_SCORE = 0.1  # detections with a lower score say little about the image
HIGHEST_QUALITY = 0.5  # upper bound of Eq. 5, for SEMI.QUALITY_SCALE 1


@dataclass(frozen=True)
class Uncertainty:
    """How uncertain a detector is about one image, each in [0, 1]. 0 if it finds nothing.

    Attributes:
        classes: mean entropy of the class probabilities of the detections, divided by its maximum.
        boxes: mean of 1 - localization quality (Eq. 5), scaled to [0, 1]; 0 for detectors that
            were not trained to predict it.
        views: disagreement of the detections in the image and in its mirror image, see
            :func:`disagreement`.
    """

    classes: float
    boxes: float
    views: float


@dataclass(frozen=True)
class Assessment:
    """An image with the uncertainty of the detector.

    Attributes:
        file: the image file.
        uncertainty: of the detector.
        features: ``(C,)`` float32, mean of each channel of the backbone's feature maps.
    """

    file: InputFile
    uncertainty: Uncertainty
    features: np.ndarray


@dataclass(frozen=True)
class Suggestion:
    """An image to label.

    Attributes:
        file: the image file.
        score: mean rank of its uncertainties among all images, in (0, 1].
        uncertainty: of the detector.
    """

    file: InputFile
    score: float
    uncertainty: Uncertainty


def suggest(
    detector: Predictor,
    unlabeled: Sequence[InputFile],
    labeled: Sequence[InputFile],
    count: int,
    *,
    batch: int | None = None,
    unreadable: list[str],
) -> list[Suggestion]:
    """Choose images to label, the most useful one first.

    Args:
        detector: trained detector.
        unlabeled: image files to choose from.
        labeled: labeled image files, which the suggestions should differ from.
        count: number of suggestions, at most.
        batch: number of images per batch. Default: 8 on a GPU, else 1.
        unreadable: a message is appended for each image that cannot be read; it is skipped.
    """
    assessed = list(assess(detector, unlabeled, batch, unreadable))
    taken = list(assess(detector, labeled, batch, unreadable))
    scores = rank_uncertainty([image.uncertainty for image in assessed])
    features = standardize([image.features for image in [*assessed, *taken]])
    chosen = choose_spread(features[: len(assessed)], scores, count, features[len(assessed) :])
    return [Suggestion(assessed[i].file, float(scores[i]), assessed[i].uncertainty) for i in chosen]


def assess(
    detector: Predictor, files: Iterable[InputFile], batch: int | None, unreadable: list[str]
) -> Iterator[Assessment]:
    """Measure the uncertainty about image files, with a progress bar on terminals.

    Args:
        detector: trained detector.
        files: image files.
        batch: number of images per batch. Default: 8 on a GPU, else 1.
        unreadable: a message is appended for each image that cannot be read; it is skipped.
    """
    readable = read_images(list(files), unreadable)
    while group := list(islice(readable, batch or detector.default_batch_size)):
        results = assess_images(detector, [image for _, image in group])
        for (frame, _), (uncertainty, features) in zip(group, results, strict=True):
            yield Assessment(frame.file, uncertainty, features)


def assess_images(
    detector: Predictor, images: Sequence[np.ndarray]
) -> list[tuple[Uncertainty, np.ndarray]]:
    """Measure the uncertainty about images, and their features.

    Images whose model inputs have the same size are processed in one batch. In a batch with larger
    ones, the padding would change features near the border.

    Args:
        images: ``(H, W, 3)`` uint8 RGB each.

    Returns:
        for each image, its uncertainty and ``(C,)`` features.
    """
    inputs = [model_input(detector.cfg, image) for image in images]
    batches: dict[torch.Size, list[int]] = {}
    for i, x in enumerate(inputs):
        batches.setdefault(x["image"].shape, []).append(i)
    results: dict[int, tuple[Uncertainty, np.ndarray]] = {}
    for indices in batches.values():
        assessed = _assess_batch(detector, [inputs[i] for i in indices])
        results.update(zip(indices, assessed, strict=True))
    return [results[i] for i in range(len(images))]


def _assess_batch(
    detector: Predictor, inputs: Sequence[dict]
) -> Iterator[tuple[Uncertainty, np.ndarray]]:
    """Yield uncertainty and features for model inputs of one size."""
    mirrored = [{**x, "image": x["image"].flip(2)} for x in inputs]
    output = detector.model.detect([*inputs, *mirrored])
    found = [x[x.scores > MIN_SCORE] for x in output.detections]
    rois = detector.model.predict_rois(output, [x.pred_boxes.tensor for x in found])
    probabilities = rois.probabilities.cpu().split([len(x) for x in found])
    size = output.detections[0].image_size
    features = image_features(output.features, detector.model.backbone.output_shape(), size)
    found = [x.to("cpu") for x in found]
    highest = HIGHEST_QUALITY * detector.cfg.SEMI.QUALITY_SCALE
    for i in range(len(inputs)):
        quality = found[i].localization_quality
        uncertainty = Uncertainty(
            classes=_mean(_entropy(probabilities[i])),
            boxes=_mean(1 - quality / highest) if detector.has_localization_quality else 0.0,
            views=disagreement(found[i], mirror(found[len(inputs) + i])),
        )
        yield uncertainty, features[i].numpy()


def image_features(
    feature_maps: dict[str, torch.Tensor], shapes: dict[str, ShapeSpec], size: tuple[int, int]
) -> torch.Tensor:
    """Average each channel of the feature maps over the images without their padding.

    Args:
        feature_maps: ``(B, C, H, W)`` each, of images that are padded to a multiple of the strides.
        shapes: their strides.
        size: height and width of all images in pixels, without padding.

    Returns:
        ``(B, sum of C)`` float32 on the CPU.
    """
    height, width = size
    levels = []
    for name, maps in feature_maps.items():
        stride = shapes[name].stride
        inside = maps[:, :, : ceil(height / stride), : ceil(width / stride)]
        levels.append(inside.mean(dim=(2, 3)))
    return torch.cat(levels, dim=1).float().cpu()


def mirror(detections: Instances) -> Instances:
    """Mirror detections from left to right. Boxes are xyxy, absolute pixels of ``image_size``."""
    x1, y1, x2, y2 = detections.pred_boxes.tensor.unbind(dim=1)
    width = detections.image_size[1]
    mirrored = Instances(detections.image_size, **detections.get_fields())
    mirrored.pred_boxes = Boxes(torch.stack([width - x2, y1, width - x1, y2], dim=1))
    return mirrored


def disagreement(first: Instances, second: Instances) -> float:
    """Return the disagreement of two sets of detections in one image, in [0, 1].

    Detections of the same class with an IoU of at least 0.5 match. The result is 1 - sum of the
    IoUs of all detections with their match (0 without one), weighted by the scores; 0 if there are
    no detections.
    """
    total = float(first.scores.sum() + second.scores.sum())
    if not total:
        return 0.0
    target = Instances(
        second.image_size,
        gt_boxes=second.pred_boxes,
        gt_classes=second.pred_classes,
        gt_crowd=torch.zeros(len(second), dtype=torch.bool),
    )
    matched = match(first, target)
    correct = matched.is_correct
    weights = first.scores[correct] + second.scores[matched.index[correct]]
    return 1 - float((matched.iou[correct] * weights).sum()) / total


def rank_uncertainty(uncertainties: Sequence[Uncertainty]) -> np.ndarray:
    """Return the mean rank of the uncertainties of each image among all, ``(N,)`` in (0, 1].

    Ranks make the three comparable without weights. Images with equal values have equal ranks.
    """
    values = np.array([[u.classes, u.boxes, u.views] for u in uncertainties]).reshape(-1, 3)
    return rankdata(values, axis=0).mean(axis=1) / max(len(values), 1)


def standardize(features: Sequence[np.ndarray]) -> np.ndarray:
    """Return features, ``(N, C)``, with mean 0 and standard deviation 1 in each channel."""
    if not features:
        return np.empty((0, 0), np.float32)
    stacked = np.stack(features)
    deviation = stacked.std(axis=0)
    return (stacked - stacked.mean(axis=0)) / np.where(deviation > 0, deviation, 1)


def choose_spread(
    features: np.ndarray, scores: np.ndarray, count: int, taken: np.ndarray
) -> list[int]:
    """Choose images that have a high score and differ from each other.

    Greedy k-center, weighted by the scores: the next image is that with the largest product of its
    score and its distance to the nearest image that is chosen or taken.

    Args:
        features: ``(N, C)``.
        scores: ``(N,)``, positive.
        count: number of images to choose, at most N.
        taken: ``(M, C)``, features of images that are already labeled.

    Returns:
        indices of the chosen images, in the order of choice.
    """
    distance = np.full(len(features), np.inf)
    for center in taken:
        distance = np.minimum(distance, np.linalg.norm(features - center, axis=1))
    available = np.ones(len(features), dtype=bool)
    chosen: list[int] = []
    while len(chosen) < min(count, len(features)):
        gain = scores * (distance if np.isfinite(distance).all() else 1)
        best = int(np.where(available, gain, -1).argmax())
        chosen.append(best)
        available[best] = False
        distance = np.minimum(distance, np.linalg.norm(features - features[best], axis=1))
    return chosen


def write_suggestions(file: Path, suggestions: Sequence[Suggestion]) -> None:
    """Write a csv file with a row for each suggestion: rank, file, score and uncertainties."""
    # File names can contain bytes that are not UTF-8.
    with file.open("w", newline="", encoding="utf-8", errors="surrogateescape") as stream:
        writer = csv.writer(stream)
        writer.writerow(["rank", "file", "score", "classes", "boxes", "views"])
        for rank, suggestion in enumerate(suggestions, 1):
            values = [suggestion.score, *asdict(suggestion.uncertainty).values()]
            writer.writerow([rank, suggestion.file.path, *(f"{value:.4f}" for value in values)])


def _entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """Entropy of each row, divided by its maximum."""
    return torch.special.entr(probabilities).sum(dim=1) / np.log(probabilities.shape[1])


def _mean(values: torch.Tensor) -> float:
    return float(values.mean()) if len(values) else 0.0
