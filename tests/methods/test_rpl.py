"""The class-adaptive part of RPL: thresholds, weights, losses and the certainty of classes."""

import pytest
import torch
from torch.testing import assert_close

from locreweight.errors import UsageError
from locreweight.methods import LabelingInputs, build_method
from locreweight.modeling.meta_arch import TeacherOutput
from tests.methods.test_methods import detections_with, expected_box_losses, sample
from tests.modeling.output_layer_cases import (
    K,
    count,
    cross_entropy_of,
    each_labels,
    each_normalizer,
    make_predictor,
    rows_of,
)
from tests.modeling.tiny_model import tiny_config


def make_method(certainty=None, **keys):
    method = build_method(tiny_config({"SEMI.METHOD": "RPL"} | keys))
    if certainty is not None:
        method.certainty = torch.tensor(certainty, dtype=torch.float64)
    return method


@pytest.mark.parametrize("certainty", [None, [7.0, 7.0, 7.0]])
def test_equal_classes_have_the_threshold_of_the_config_and_weight_1(certainty):
    method = make_method(certainty)
    assert method.thresholds.tolist() == [0.8] * K and method.weights.tolist() == [1.0] * K


def test_half_certainty_lowers_the_threshold_and_raises_the_weight():
    method = make_method([4.0, 2.0, 1.0])
    assert_close(method.thresholds, 0.8 * torch.tensor([1, 2**-0.05, 4**-0.05]).double())
    assert_close(method.weights, torch.tensor([1, 2**0.6, 4**0.6]).double())


def test_class_that_is_never_found_has_a_finite_threshold_and_weight():
    method = make_method([1e6, 0.0, 1.0], **{"SEMI.RPL.MIN_RATIO": 0.1})
    assert_close(method.thresholds[1:], torch.full((2,), 0.8 * 10**-0.05).double())
    assert_close(method.weights[1:], torch.full((2,), 10**0.6).double())


def test_exponents_of_zero_make_all_classes_equal():
    exponents = {"SEMI.RPL.THRESHOLD_EXPONENT": 0.0, "SEMI.RPL.WEIGHT_EXPONENT": 0.0}
    method = make_method([9.0, 1.0, 0.0], **exponents)
    assert method.thresholds.tolist() == [0.8] * K and method.weights.tolist() == [1.0] * K


def select(method, detections):
    return method.select_pseudo_labels(LabelingInputs(None, TeacherOutput({}, [detections]), []))


def test_pseudo_labels_pass_the_threshold_of_their_class_and_the_quality():
    method = make_method([100.0, 1.0, 100.0])  # thresholds 0.8, 0.635, 0.8
    detections = detections_with([0.81, 0.64, 0.79, 0.79, 0.63, 0.99])
    detections.localization_quality = torch.tensor([0.3, 0.3, 0.3, 0.3, 0.3, 0.19])
    (labels,) = select(method, detections)
    assert labels.gt_classes.tolist() == [0, 1]
    assert_close(labels.gt_weight, torch.tensor([1.0, 100**0.6]))


def test_no_detections_give_no_pseudo_labels():
    (labels,) = select(make_method(), detections_with([]))
    assert len(labels) == 0 and labels.gt_weight.shape == (0,)


@each_normalizer
@each_labels
def test_losses_weight_foreground_by_class(by_sampled, labels):
    predictor = make_predictor(normalize_by_sampled=by_sampled)
    weights = 1 + torch.rand(count(labels))
    proposals = sample(labels, predictor, gt_weight=weights)
    method = make_method()
    sums, counts = [0.0, 0.0], [0, 0]
    for row, (label, _, _) in enumerate(rows_of(proposals.instances)):
        weight = weights[row].item() if label < K else 1.0
        loss = cross_entropy_of(proposals.predictions.scores[row].tolist(), label)
        sums[label < K] += weight * loss
        counts[label < K] += 1
    if by_sampled:
        expected = sum(sums) / count(labels)
    else:
        expected = sum(x / max(n, 1) for x, n in zip(sums, counts, strict=True))
    assert_close(method.classification_loss(proposals), torch.tensor(expected))

    boxes = [
        x * weights[row].item() for row, x in expected_box_losses(proposals, "corners", False, 1.0)
    ]
    expected = sum(boxes) / max(count(labels) if by_sampled else len(boxes), 1)
    assert_close(method.box_loss(proposals), torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_certainty_is_the_sum_of_the_scores_of_all_processes():
    method = make_method([1.0, 2.0, 3.0], **{"SEMI.RPL.MIN_QUALITY": -1.0})
    observed = []
    for scores in ([0.9, 0.95, 0.5], [0.85], []):
        detections = detections_with(scores)
        inputs = LabelingInputs(None, TeacherOutput({}, [detections]), [])
        observed.append(method.observe(inputs, method.select_pseudo_labels(inputs)))
    method.update_state(observed)
    assert_close(method.certainty, torch.tensor([2.75, 2.95, 3.0]).double(), rtol=1e-6, atol=0)
    other = make_method()
    other.load_state_dict(method.state_dict())
    assert torch.equal(other.certainty, method.certainty)


def test_bad_settings_name_the_key():
    with pytest.raises(UsageError, match=r"SEMI.RPL.MIN_QUALITY .*GAUSSIAN_BOXES True"):
        make_method(**{"MODEL.ROI_BOX_HEAD.GAUSSIAN_BOXES": False})
    for ratio in (0.0, 1.5):
        with pytest.raises(UsageError, match=rf"SEMI.RPL.MIN_RATIO is {ratio}"):
            make_method(**{"SEMI.RPL.MIN_RATIO": ratio})
