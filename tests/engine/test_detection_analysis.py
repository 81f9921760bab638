"""Analysis of detections: score threshold, precision and recall, average precision, confusions."""

import contextlib
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from locreweight.engine.detection_analysis import (
    RECALLS,
    DetectionAnalysis,
    analyze,
    best_operating_point,
    operating_point,
    read_analyses,
    write_analyses,
)
from locreweight.errors import UsageError

NAMES = ["cat", "dog"]
LEFT, RIGHT, BELOW = [0, 0, 20, 20], [40, 0, 20, 20], [0, 40, 20, 20]  # boxes, xywh


def evaluate(ground_truth, detections):
    """Analyze boxes ``(image, class, box, crowd)`` and ``(image, class, box, score)``."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "info": {},
            "images": [{"id": i} for i in range(3)],
            "categories": [{"id": 10 * (i + 1), "name": name} for i, name in enumerate(NAMES)],
            "annotations": [
                {
                    "id": i,
                    "image_id": image,
                    "category_id": 10 * (label + 1),
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": int(crowd),
                }
                for i, (image, label, box, crowd) in enumerate(ground_truth, 1)
            ],
        }
        truth.createIndex()
        found = truth.loadRes(
            [
                {"image_id": i, "category_id": 10 * (label + 1), "bbox": box, "score": score}
                for i, label, box, score in detections
            ]
        )
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    return analyze(evaluation, NAMES)


TRUTH = [(0, 0, LEFT, False), (0, 1, RIGHT, False), (1, 0, LEFT, False)]


def test_perfect_detections():
    analysis = evaluate(TRUTH, [(i, label, box, 0.8) for i, label, box, _ in TRUTH])
    assert analysis.best.f1 == analysis.best.precision == analysis.best.recall == 1
    assert analysis.best.threshold == pytest.approx(0.4)  # halfway to 0: nothing is below
    assert analysis.confusion == [[2, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert [(c.name, c.boxes, c.ap, c.ap50, c.ap75) for c in analysis.classes] == [
        ("cat", 2, 100, 100, 100),
        ("dog", 1, 100, 100, 100),
    ]
    assert analysis.classes[0].precisions == [1.0] * len(RECALLS)


def test_errors_are_counted_where_they_belong():
    detections = [
        (0, 0, LEFT, 0.9),  # correct
        (0, 0, RIGHT, 0.8),  # a dog that is called a cat
        (0, 0, BELOW, 0.7),  # nothing
        (1, 1, LEFT, 0.2),  # a cat that is called a dog, below the threshold
    ]
    analysis = evaluate(TRUTH, detections)
    # F1 is 2 / 4 with the first detection and 2 / (n + 3) with n of them.
    assert analysis.best.threshold == pytest.approx(0.85)
    assert (analysis.best.precision, analysis.best.recall) == (1, pytest.approx(1 / 3))
    assert analysis.best.f1 == pytest.approx(0.5)
    assert analysis.confusion == [[1, 0, 1], [0, 0, 1], [0, 0, 0]]
    cat, dog = analysis.classes
    assert (cat.precision, cat.recall) == (1, 0.5)
    assert (dog.precision, dog.recall) == (None, 0)


def test_confusions_are_matched_across_classes():
    detections = [(0, 0, LEFT, 0.9), (1, 0, LEFT, 0.9), (0, 0, RIGHT, 0.9), (0, 1, BELOW, 0.9)]
    assert evaluate(TRUTH, detections).confusion == [[2, 0, 0], [1, 0, 0], [0, 1, 0]]


def test_own_class_is_matched_first():
    """A wrong class with a higher score does not take the box of the correct one."""
    detections = [(0, 1, LEFT, 0.9), (0, 0, LEFT, 0.8), (1, 0, LEFT, 0.8), (0, 1, RIGHT, 0.8)]
    assert evaluate(TRUTH, detections).confusion == [[2, 0, 0], [0, 1, 0], [0, 1, 0]]


def test_crowds_count_neither_as_boxes_nor_as_errors():
    truth = [*TRUTH, (2, 0, [0, 0, 60, 60], True)]
    detections = [(i, label, box, 0.8) for i, label, box, _ in TRUTH]
    detections += [(2, 0, LEFT, 0.9), (2, 0, RIGHT, 0.9)]
    analysis = evaluate(truth, detections)
    assert analysis.best.f1 == 1 and analysis.classes[0].boxes == 2
    assert analysis.confusion == [[2, 0, 0], [0, 1, 0], [0, 0, 0]]


def test_class_without_boxes_has_no_results():
    analysis = evaluate([TRUTH[0]], [(0, 0, LEFT, 0.9), (0, 1, BELOW, 0.3)])
    dog = analysis.classes[1]
    assert (dog.boxes, dog.ap, dog.recall, dog.precisions) == (0, None, None, [])
    assert analysis.best.threshold == pytest.approx(0.6)


def test_without_correct_detections_there_is_no_threshold():
    analysis = evaluate(TRUTH, [(0, 0, BELOW, 0.9)])
    assert analysis.best is None
    assert analysis.confusion == [[0, 0, 2], [0, 0, 1], [0, 0, 0]]
    assert {point.f1 for point in analysis.curve} == {0.0}


def test_curve_goes_from_all_detections_to_none():
    analysis = evaluate(TRUTH, [(0, 0, LEFT, 0.9), (0, 0, BELOW, 0.4)])
    first, last = analysis.curve[0], analysis.curve[-1]
    assert (first.precision, first.recall) == (0.5, pytest.approx(1 / 3))
    assert (last.precision, last.recall, last.f1) == (None, 0, 0)
    assert [point.threshold for point in analysis.curve] == pytest.approx(np.linspace(0, 1, 101))


def test_best_threshold_is_that_of_an_exhaustive_search():
    random = np.random.default_rng(0)
    score = random.random(60).round(1)  # with many equal scores
    correct = random.random(60) < score
    best = best_operating_point(score, correct, num_boxes=50)
    search = [operating_point(score, correct, 50, limit).f1 for limit in np.arange(-0.05, 1, 0.1)]
    assert best.f1 == pytest.approx(max(search))
    assert operating_point(score, correct, 50, best.threshold) == best


def test_round_trip_and_damaged_file(tmp_path):
    analyses = {"a": evaluate(TRUTH, [(0, 0, LEFT, 0.9)]), "b": evaluate(TRUTH, [(0, 0, BELOW, 1)])}
    file = tmp_path / "new" / "analysis.json"
    write_analyses(file, analyses)
    assert read_analyses(file) == analyses
    assert isinstance(read_analyses(file)["a"], DetectionAnalysis)
    file.write_text(file.read_text()[:-9])
    with pytest.raises(UsageError, match=r"analysis\.json is damaged"):
        read_analyses(file)
