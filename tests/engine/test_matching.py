"""Matching of detections and ground truth; precision, recall and IoU."""

import math

import pytest
import torch
from detectron2.structures import Boxes, Instances

from locreweight.engine.matching import Match, agreement, agreement_by_quality, join, match

SIZE = (100, 100)


def detections(boxes, scores, classes=None, quality=None):
    count = len(boxes)
    return Instances(
        SIZE,
        pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
        pred_classes=torch.tensor(classes or [0] * count, dtype=torch.int64),
        scores=torch.tensor(scores, dtype=torch.float32),
        localization_quality=torch.tensor(quality or [0.4] * count, dtype=torch.float32),
    )


def ground_truth(boxes, classes=None, crowd=None):
    count = len(boxes)
    return Instances(
        SIZE,
        gt_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
        gt_classes=torch.tensor(classes or [0] * count, dtype=torch.int64),
        gt_crowd=torch.tensor(crowd or [False] * count, dtype=torch.bool),
    )


BOX = [0.0, 0.0, 10.0, 10.0]
HALF = [0.0, 0.0, 10.0, 5.0]  # IoU 0.5 with BOX
FAR = [50.0, 50.0, 60.0, 60.0]


def test_object_is_matched_once_by_the_highest_score():
    matched = match(detections([BOX, HALF, BOX], [0.3, 0.9, 0.5]), ground_truth([BOX]))
    assert matched.index.tolist() == [-1, 0, -1]
    assert matched.iou.tolist() == [0.0, 0.5, 0.0]
    assert matched.num_ground_truth == 1


def test_detection_is_matched_to_the_object_with_the_highest_iou():
    near = [2.0, 0.0, 12.0, 10.0]
    matched = match(detections([BOX, near], [0.9, 0.8]), ground_truth([near, BOX]))
    assert matched.index.tolist() == [1, 0]
    assert matched.iou.tolist() == [1.0, 1.0]


def test_other_classes_are_not_matched():
    matched = match(detections([BOX], [0.9], classes=[1]), ground_truth([BOX], classes=[0]))
    assert not matched.is_correct.any()


def test_low_iou_is_not_matched():
    assert not match(detections([[0, 0, 10, 4.9]], [0.9]), ground_truth([BOX])).is_correct.any()


def test_crowds_count_neither_as_objects_nor_as_errors():
    matched = match(
        detections([BOX, FAR, FAR], [0.9, 0.8, 0.7]), ground_truth([BOX, FAR], crowd=[False, True])
    )
    assert matched.index.tolist() == [0]
    assert matched.num_ground_truth == 1
    assert agreement(matched).precision == 1.0


@pytest.mark.parametrize(
    ("boxes", "gt_boxes", "precision", "recall"),
    [([], [BOX], math.nan, 0.0), ([BOX], [], 0.0, math.nan), ([], [], math.nan, math.nan)],
)
def test_agreement_without_detections_or_ground_truth_is_nan(boxes, gt_boxes, precision, recall):
    result = agreement(match(detections(boxes, [0.9] * len(boxes)), ground_truth(gt_boxes)))
    assert result.precision == pytest.approx(precision, nan_ok=True)
    assert result.recall == pytest.approx(recall, nan_ok=True)
    assert math.isnan(result.mean_iou)


def test_agreement_of_several_images():
    matched = join(
        [
            match(detections([BOX, FAR], [0.9, 0.8]), ground_truth([BOX])),
            match(detections([HALF], [0.9]), ground_truth([BOX, FAR])),
        ]
    )
    result = agreement(matched)
    assert result.precision == pytest.approx(2 / 3)
    assert result.recall == pytest.approx(2 / 3)
    assert result.mean_iou == pytest.approx((1 + 0.5) / 2)


def test_quarters_are_sorted_by_quality_and_their_recalls_add_up():
    quality = torch.tensor([0.5, 0.1, 0.4, 0.2, 0.45, 0.15, 0.35, 0.25])
    correct = quality > 0.3
    matched = Match(torch.where(correct, 0, -1), correct * 0.8, quality, num_ground_truth=10)
    quarters = agreement_by_quality(matched)
    assert [q.precision for q in quarters] == [0.0, 0.0, 1.0, 1.0]
    assert sum(q.recall for q in quarters) == pytest.approx(agreement(matched).recall)
    assert quarters[3].mean_iou == pytest.approx(0.8)


def test_empty_quarters_are_nan():
    matched = match(detections([BOX], [0.9]), ground_truth([BOX]))
    precisions = [q.precision for q in agreement_by_quality(matched)]
    assert precisions[0] == 1.0 and all(math.isnan(p) for p in precisions[1:])
