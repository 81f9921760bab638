"""Detections are paired with the truth one to one; precision, recall and IoU follow."""

import math

import pytest
import torch
from detectron2.structures import Boxes, Instances

from locreweight.engine.matching import Match, agreement, agreement_by_quality, join, match

SIZE = (100, 100)


def found(boxes, scores, classes=None, quality=None):
    count = len(boxes)
    return Instances(
        SIZE,
        pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
        pred_classes=torch.tensor(classes or [0] * count, dtype=torch.int64),
        scores=torch.tensor(scores, dtype=torch.float32),
        localization_quality=torch.tensor(quality or [0.4] * count, dtype=torch.float32),
    )


def truth(boxes, classes=None, crowd=None):
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


def test_one_object_is_found_once_by_the_highest_score():
    matched = match(found([BOX, HALF, BOX], [0.3, 0.9, 0.5]), truth([BOX]))
    assert matched.truth.tolist() == [-1, 0, -1]
    assert matched.iou.tolist() == [0.0, 0.5, 0.0]
    assert matched.num_truth == 1


def test_each_detection_takes_the_object_that_it_overlaps_most():
    near = [2.0, 0.0, 12.0, 10.0]
    matched = match(found([BOX, near], [0.9, 0.8]), truth([near, BOX]))
    assert matched.truth.tolist() == [1, 0]
    assert matched.iou.tolist() == [1.0, 1.0]


def test_the_class_has_to_be_the_same():
    matched = match(found([BOX], [0.9], classes=[1]), truth([BOX], classes=[0]))
    assert not matched.right.any()


def test_too_little_overlap_is_none():
    assert not match(found([[0, 0, 10, 4.9]], [0.9]), truth([BOX])).right.any()


def test_crowds_are_neither_to_be_found_nor_wrong_to_be_found():
    matched = match(found([BOX, FAR, FAR], [0.9, 0.8, 0.7]), truth([BOX, FAR], crowd=[False, True]))
    assert matched.truth.tolist() == [0]
    assert matched.num_truth == 1
    assert agreement(matched).precision == 1.0


@pytest.mark.parametrize(
    ("boxes", "there", "precision", "recall"),
    [([], [BOX], math.nan, 0.0), ([BOX], [], 0.0, math.nan), ([], [], math.nan, math.nan)],
)
def test_without_detections_or_truth_it_is_not_known(boxes, there, precision, recall):
    result = agreement(match(found(boxes, [0.9] * len(boxes)), truth(there)))
    assert result.precision == pytest.approx(precision, nan_ok=True)
    assert result.recall == pytest.approx(recall, nan_ok=True)
    assert math.isnan(result.mean_iou)


def test_agreement_of_several_images():
    matched = join(
        [
            match(found([BOX, FAR], [0.9, 0.8]), truth([BOX])),
            match(found([HALF], [0.9]), truth([BOX, FAR])),
        ]
    )
    result = agreement(matched)
    assert result.precision == pytest.approx(2 / 3)
    assert result.recall == pytest.approx(2 / 3)
    assert result.mean_iou == pytest.approx((1 + 0.5) / 2)


def test_quarters_go_from_the_lowest_quality_upwards_and_their_recalls_add_up():
    quality = torch.tensor([0.5, 0.1, 0.4, 0.2, 0.45, 0.15, 0.35, 0.25])
    right = quality > 0.3
    matched = Match(torch.where(right, 0, -1), right * 0.8, quality, num_truth=10)
    quarters = agreement_by_quality(matched)
    assert [q.precision for q in quarters] == [0.0, 0.0, 1.0, 1.0]
    assert sum(q.recall for q in quarters) == pytest.approx(agreement(matched).recall)
    assert quarters[3].mean_iou == pytest.approx(0.8)


def test_fewer_detections_than_quarters_leave_some_unknown():
    matched = match(found([BOX], [0.9]), truth([BOX]))
    precisions = [q.precision for q in agreement_by_quality(matched)]
    assert precisions[0] == 1.0 and all(math.isnan(p) for p in precisions[1:])
