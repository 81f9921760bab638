"""Unbiased Teacher v2: the coordinates that have a box loss, compared with loops over numbers."""

import math

import pytest
import torch
from torch.testing import assert_close

from locreweight.methods import LabelingInputs, build_method
from locreweight.modeling.meta_arch import TeacherOutput
from tests.methods.test_certainty import VIEWS, make_detections, make_sample
from tests.methods.test_methods import sample
from tests.modeling.output_layer_cases import (
    K,
    coded,
    each_labels,
    each_normalizer,
    four_of,
    make_predictor,
    rows_of,
    smooth_l1,
)
from tests.modeling.tiny_model import tiny_config

LABELS = [[0, K, 2, K], [1, 1, K]]


def make_method(**keys):
    return build_method(tiny_config({"SEMI.METHOD": "UnbiasedTeacherV2"} | keys))


def make_proposals(labels, certainties, **predictor):
    proposals = sample(labels, make_predictor(**predictor))
    parts = certainties.split([len(x) for x in proposals.instances])
    for x, part in zip(proposals.instances, parts, strict=True):
        if x.has("gt_boxes"):
            x.gt_certainty = part
    return proposals


@each_normalizer
@each_labels
def test_box_loss_is_on_coordinates_that_the_teacher_knows_better(by_sampled, labels):
    total = sum(map(len, labels))
    certainties = torch.rand(total, 4)
    proposals = make_proposals(labels, certainties, normalize_by_sampled=by_sampled)
    expected, foreground = 0.0, 0
    for row, (label, proposal, target) in enumerate(rows_of(proposals.instances)):
        if label == K:
            continue
        foreground += 1
        deltas = four_of(proposals.predictions.deltas, row, label, False)
        variances = four_of(proposals.predictions.log_variance, row, label, False)
        for i in range(4):
            teacher, student = certainties[row, i].item(), 1 / (1 + math.exp(variances[i]))
            if teacher > 0.5 and teacher > student + 0.1:
                expected += smooth_l1(deltas[i] - coded("corners", proposal, target)[i])
    expected /= max(total if by_sampled else foreground, 1)
    loss = make_method().box_loss(proposals)
    assert_close(loss, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_gradient_reaches_only_the_chosen_coordinates_and_no_variance():
    certainties = torch.zeros(7, 4)
    certainties[0, 2] = 1.0
    proposals = make_proposals(LABELS, certainties)
    make_method().box_loss(proposals).backward()
    gradient = proposals.predictions.deltas.grad
    assert gradient.nonzero().tolist() == [[0, 2]]
    assert proposals.predictions.log_variance.grad is None


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_uncertain_teacher_gives_an_exact_zero_that_keeps_the_graph(value):
    proposals = make_proposals(LABELS, torch.full((7, 4), value))
    loss = make_method().box_loss(proposals)
    loss.backward()
    assert loss.item() == 0 and proposals.predictions.deltas.grad is not None


def test_pseudo_labels_have_the_certainty_of_their_detection():
    detections = make_detections()
    method = make_method(**{"SEMI.PSEUDO_LABEL_THRESHOLD": 0.5})
    output = TeacherOutput({}, [detections])
    inputs = LabelingInputs(None, output, [make_sample(VIEWS["flipped"][0])])
    (labels,) = method.select_pseudo_labels(inputs)
    expected = torch.sigmoid(-detections.log_variance[[0, 2]][:, [2, 1, 0, 3]])
    assert_close(labels.gt_certainty, expected)
