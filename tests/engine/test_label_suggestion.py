"""Suggestion of images to label: uncertainties, spread, and the tasks that are written."""

import math

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from locreweight.engine.label_suggestion import (
    Uncertainty,
    _entropy,
    choose_spread,
    disagreement,
    mirror,
    rank_uncertainty,
    standardize,
)


def detections(boxes, classes=None, scores=None, size=(50, 100)):
    count = len(boxes)
    found = Instances(size, pred_boxes=Boxes(torch.tensor(boxes).float().reshape(-1, 4)))
    found.pred_classes = torch.tensor(classes or [0] * count, dtype=torch.long)
    found.scores = torch.tensor(scores or [1.0] * count)
    found.localization_quality = torch.full((count,), 0.3)
    return found


def test_entropy_is_one_for_equal_probabilities_and_zero_for_certain_ones():
    rows = torch.tensor([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0]])
    assert _entropy(rows).tolist() == pytest.approx([1, 0, math.log(2) / math.log(4)])


def test_mirroring_twice_changes_nothing():
    found = detections([[10, 5, 30, 20]])
    mirrored = mirror(found)
    assert mirrored.pred_boxes.tensor.tolist() == [[70, 5, 90, 20]]
    assert torch.equal(mirror(mirrored).pred_boxes.tensor, found.pred_boxes.tensor)
    assert mirrored.scores is found.scores
    assert len(mirror(detections([]))) == 0


BOX, OTHER = [0, 0, 10, 10], [20, 20, 40, 40]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (detections([BOX, OTHER]), detections([OTHER, BOX]), 0),
        (detections([BOX]), detections([]), 1),
        (detections([]), detections([]), 0),
        (detections([BOX]), detections([BOX], classes=[1]), 1),
        # IoU 8/10.
        (detections([BOX]), detections([[0, 0, 8, 10]]), 0.2),
        # OTHER is missing with its score of 0.5, of a total of 1 + 1 + 0.5.
        (detections([BOX, OTHER], scores=[1, 0.5]), detections([BOX]), 0.2),
    ],
)
def test_disagreement(first, second, expected):
    assert disagreement(first, second) == pytest.approx(expected, abs=1e-6)
    assert disagreement(second, first) == pytest.approx(expected, abs=1e-6)


def test_ranks_do_not_depend_on_scales():
    values = [Uncertainty(0.1, 0.01, 0.5), Uncertainty(0.2, 0.02, 0.5), Uncertainty(0.9, 0.03, 0.5)]
    assert rank_uncertainty(values).tolist() == pytest.approx([4 / 9, 6 / 9, 8 / 9])
    assert rank_uncertainty([]).shape == (0,)


def test_standardized_features():
    features = standardize([np.array([1.0, 5.0]), np.array([3.0, 5.0])])
    assert features.tolist() == [[-1, 0], [1, 0]]
    assert standardize([]).shape == (0, 0)


# --- spread ---------------------------------------------------------------------------------------


def test_first_choice_has_the_highest_score_and_the_next_are_far_away():
    features = np.array([[0.0], [0.1], [10.0], [5.0]])
    scores = np.array([0.9, 1.0, 0.5, 0.5])
    assert choose_spread(features, scores, 3, np.empty((0, 1))) == [1, 2, 3]


def test_images_like_the_labeled_ones_come_last():
    features = np.array([[0.0], [1.0], [2.0]])
    assert choose_spread(features, np.ones(3), 3, np.array([[0.0]])) == [2, 1, 0]


def test_scores_decide_between_equally_distant_images():
    features = np.array([[-1.0], [1.0]])
    assert choose_spread(features, np.array([0.5, 0.6]), 1, np.array([[0.0]])) == [1]


@pytest.mark.parametrize("taken", [0, 3])
def test_choice_is_that_of_the_definition(taken):
    rng = np.random.default_rng(0)
    features, labeled = rng.normal(size=(30, 4)), rng.normal(size=(taken, 4))
    scores = rng.uniform(0.1, 1, 30)
    chosen = choose_spread(features, scores, 8, labeled)
    for step, index in enumerate(chosen):
        centers = [*labeled, *features[chosen[:step]]]
        rest = set(range(30)) - set(chosen[:step])
        gains = {
            i: scores[i] * min((math.dist(features[i], c) for c in centers), default=1)
            for i in rest
        }
        assert index == max(gains, key=gains.get)


@pytest.mark.parametrize("count", [0, 3, 7])
def test_copies_are_chosen_once_each(count):
    chosen = choose_spread(np.zeros((3, 2)), np.ones(3), count, np.empty((0, 2)))
    assert sorted(chosen) == list(range(min(count, 3)))


def test_no_images():
    assert choose_spread(np.empty((0, 0)), np.empty(0), 5, np.empty((0, 0))) == []
