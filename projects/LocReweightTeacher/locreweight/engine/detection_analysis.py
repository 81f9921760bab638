"""Analyze the detections of an evaluation: results per class, score thresholds, confusions.

A detection is correct if it is matched to a box of the same class at IoU 0.5, as in COCO's metric.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask
from pycocotools.cocoeval import COCOeval

from ..errors import UsageError
from ..file_io import atomic_write_bytes

IOU_THRESHOLD = 0.5
THRESHOLDS = np.linspace(0, 1, 101)  # of ScoreCurve
RECALLS = np.linspace(0, 1, 101)  # of ClassAnalysis.precisions, as in COCO's metric


@dataclass(frozen=True)
class OperatingPoint:
    """Precision, recall and F1, in [0, 1], of the detections above a score threshold.

    They count all boxes of the test set together, so that frequent classes count more. Precision is
    None if there is no detection.
    """

    threshold: float
    precision: float | None
    recall: float
    f1: float


@dataclass(frozen=True)
class ClassAnalysis:
    """Results of one class; None where the test set has no box of the class.

    Attributes:
        name: name of the class.
        boxes: number of ground truth boxes, without crowd regions.
        ap, ap50, ap75: in percent.
        precision, recall: of the detections above the best threshold of all classes, in [0, 1].
            Precision is None if there is no detection.
        precisions: interpolated precision at each of :data:`RECALLS`; empty without boxes.
    """

    name: str
    boxes: int
    ap: float | None
    ap50: float | None
    ap75: float | None
    precision: float | None
    recall: float | None
    precisions: list[float]


@dataclass(frozen=True)
class DetectionAnalysis:
    """Analysis of the detections in a test set.

    Attributes:
        best: the threshold with the highest F1; None if no detection is correct.
        curve: results at each of :data:`THRESHOLDS`.
        classes: in the order of the model's classes.
        confusion: ``[ground truth][detection]`` numbers of boxes above the best threshold. The last
            row are detections of nothing, the last column are missed boxes.
    """

    best: OperatingPoint | None
    curve: list[OperatingPoint]
    classes: list[ClassAnalysis]
    confusion: list[list[int]]

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> DetectionAnalysis:
        """Create an analysis from parsed json."""
        best = content["best"]
        return cls(
            OperatingPoint(**best) if best else None,
            [OperatingPoint(**point) for point in content["curve"]],
            [ClassAnalysis(**each) for each in content["classes"]],
            content["confusion"],
        )


def analyze(evaluated: COCOeval, class_names: Sequence[str]) -> DetectionAnalysis:
    """Analyze the detections of a COCO evaluation.

    Args:
        evaluated: evaluated and accumulated over all IoU thresholds.
        class_names: in the order of the category ids of the ground truth.
    """
    matches = _match(evaluated)
    score = np.concatenate([match.score for match in matches])
    correct = np.concatenate([match.correct for match in matches])
    num_boxes = sum(match.num_boxes for match in matches)
    best = best_operating_point(score, correct, num_boxes)
    limit = best.threshold if best else np.inf
    precisions = evaluated.eval["precision"][:, :, :, 0, -1]  # (IoU, recall, class)
    classes = []
    for i, (name, match) in enumerate(zip(class_names, matches, strict=True)):
        at_limit = operating_point(match.score, match.correct, match.num_boxes, limit)
        known = bool(match.num_boxes)
        classes.append(
            ClassAnalysis(
                name=name,
                boxes=match.num_boxes,
                ap=_percent(precisions[:, :, i]),
                ap50=_percent(precisions[0, :, i]),
                ap75=_percent(precisions[5, :, i]),
                precision=at_limit.precision,
                recall=at_limit.recall if known else None,
                precisions=precisions[0, :, i].round(4).tolist() if known else [],
            )
        )
    return DetectionAnalysis(
        best,
        [operating_point(score, correct, num_boxes, threshold) for threshold in THRESHOLDS],
        classes,
        _confusion(evaluated, matches, limit).tolist(),
    )


def best_operating_point(
    score: np.ndarray, correct: np.ndarray, num_boxes: int
) -> OperatingPoint | None:
    """Return the score threshold with the highest F1; None if no detection is correct.

    The threshold is halfway between the lowest score above it and the next lower score.

    Args:
        score: ``(N,)``.
        correct: ``(N,)`` bool.
        num_boxes: number of ground truth boxes.
    """
    if not correct.any():
        return None
    order = np.argsort(-score, kind="stable")
    descending = score[order]
    following = np.append(descending[1:], 0.0)
    f1 = 2 * correct[order].cumsum() / (np.arange(1, len(score) + 1) + num_boxes)
    f1[descending == following] = 0  # a threshold cannot separate equal scores
    last = int(f1.argmax())
    threshold = float((descending[last] + following[last]) / 2)
    return operating_point(score, correct, num_boxes, threshold)


def operating_point(
    score: np.ndarray, correct: np.ndarray, num_boxes: int, threshold: float
) -> OperatingPoint:
    """Return precision, recall and F1 of the detections with a score above a threshold."""
    above = score > threshold
    detected, right = int(above.sum()), int(correct[above].sum())
    return OperatingPoint(
        threshold=float(threshold),
        precision=right / detected if detected else None,
        recall=right / num_boxes if num_boxes else 0.0,
        f1=2 * right / (detected + num_boxes) if detected + num_boxes else 0.0,
    )


def write_analyses(file: Path, analyses: Mapping[str, DetectionAnalysis]) -> None:
    """Write the analysis of each test set to a json file.

    Raises:
        OSError: if the file cannot be written.
    """
    content = {name: asdict(analysis) for name, analysis in analyses.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(file, json.dumps(content).encode())


def read_analyses(file: Path) -> dict[str, DetectionAnalysis]:
    """Read a file of :func:`write_analyses`: name of the test set -> analysis.

    Raises:
        UsageError: if it is damaged.
    """
    try:
        content = json.loads(file.read_text())
        return {name: DetectionAnalysis.from_dict(each) for name, each in content.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{file} is damaged, evaluate the run again: {error}") from error


@dataclass(frozen=True)
class _ClassMatches:
    """Detections of one class in all images, without those that overlap crowd regions.

    Attributes:
        score: ``(N,)``.
        correct: ``(N,)`` bool.
        wrong_ids: image -> ids of detections that are not correct, highest score first.
        boxes: image -> id of each ground truth box and the score of its detection, -inf for none.
        num_boxes: number of ground truth boxes.
    """

    score: np.ndarray
    correct: np.ndarray
    wrong_ids: dict[int, list[int]]
    boxes: dict[int, list[tuple[int, float]]]
    num_boxes: int


def _match(evaluated: COCOeval) -> list[_ClassMatches]:
    """Match detections to ground truth at IoU 0.5, class by class."""
    # Detectron2's faster evaluation does not keep the matches.
    matching = COCOeval(evaluated.cocoGt, evaluated.cocoDt, "bbox")
    matching.params.imgIds = evaluated.params.imgIds
    matching.params.iouThrs = np.array([IOU_THRESHOLD])
    matching.params.maxDets = [evaluated.params.maxDets[-1]]
    matching.params.areaRng, matching.params.areaRngLbl = [evaluated.params.areaRng[0]], ["all"]
    with redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        matching.evaluate()
    classes: dict[int, list[dict]] = {category: [] for category in matching.params.catIds}
    for image in filter(None, matching.evalImgs):
        classes[image["category_id"]].append(image)
    return [_join(images) for images in classes.values()]


def _join(images: Sequence[dict]) -> _ClassMatches:
    scores, corrects = [np.zeros(0)], [np.zeros(0, bool)]
    wrong_ids, boxes = {}, {}
    for image in images:
        counts = ~image["dtIgnore"][0].astype(bool)
        score, correct = np.array(image["dtScores"]), image["dtMatches"][0] > 0
        scores.append(score[counts])
        corrects.append(correct[counts])
        ids = np.array(image["dtIds"], int)
        wrong_ids[image["image_id"]] = ids[counts & ~correct].tolist()
        score_of = dict(zip(ids.tolist(), score.tolist(), strict=True))
        boxes[image["image_id"]] = [
            (box, score_of.get(int(detection), -np.inf))
            for box, detection, ignored in zip(
                image["gtIds"], image["gtMatches"][0], image["gtIgnore"], strict=True
            )
            if not ignored
        ]
    num_boxes = sum(map(len, boxes.values()))
    return _ClassMatches(
        np.concatenate(scores), np.concatenate(corrects), wrong_ids, boxes, num_boxes
    )


def _confusion(evaluated: COCOeval, matches: Sequence[_ClassMatches], limit: float) -> np.ndarray:
    """Match what is left after matching within classes, highest score first."""
    truth, detected, nothing = evaluated.cocoGt.anns, evaluated.cocoDt.anns, len(matches)
    confusion = np.zeros((nothing + 1, nothing + 1), int)
    for image in sorted({image for match in matches for image in match.boxes}):
        missed, wrong = [], []
        for label, match in enumerate(matches):
            boxes = match.boxes.get(image, [])
            missed += [(label, truth[box]) for box, score in boxes if score <= limit]
            confusion[label, label] += sum(score > limit for _, score in boxes)
            found = (detected[i] for i in match.wrong_ids.get(image, []))
            wrong += [(label, detection) for detection in found if detection["score"] > limit]
        wrong.sort(key=lambda pair: -pair[1]["score"])
        boxes_of = ([entry["bbox"] for _, entry in group] for group in (wrong, missed))
        iou = np.reshape(mask.iou(*boxes_of, [0] * len(missed)), (len(wrong), len(missed)))
        # One more column, for detections that overlap no box.
        iou = np.pad(iou, ((0, 0), (0, 1)), constant_values=IOU_THRESHOLD - 1e-10)
        missed_labels = [label for label, _ in missed]
        for i, (label, _) in enumerate(wrong):
            j = int(iou[i].argmax())
            if j == len(missed):
                confusion[nothing, label] += 1
            else:
                confusion[missed_labels[j], label] += 1
                iou[:, j] = -1
                missed_labels[j] = -1
        for label in missed_labels:
            if label >= 0:
                confusion[label, nothing] += 1
    return confusion


def _percent(precisions: np.ndarray) -> float | None:
    """COCO's average precision in percent; -1 marks classes without boxes."""
    known = precisions[precisions > -1]
    return round(float(known.mean() * 100), 4) if known.size else None
