"""CST: the cycle of teachers and students, and the weights of pseudo-labels."""

import math

import pytest
import torch
from torch.testing import assert_close

from locreweight.losses.focal import focal_cross_entropy
from locreweight.methods import LabelingInputs, build_method
from locreweight.methods.base import to_pseudo_labels
from locreweight.methods.cst import kl_divergence
from tests.engine.test_training_step import make_sample
from tests.methods.test_methods import sample
from tests.modeling.output_layer_cases import K, count, each_labels, make_predictor
from tests.modeling.tiny_model import random_image, tiny_config, tiny_model

THRESHOLD = 0.3


@pytest.fixture(scope="module")
def teachers():
    """Two teachers with different weights, whose class probabilities differ clearly."""
    models = []
    for seed in range(2):
        model = tiny_model().eval()
        torch.manual_seed(seed)
        with torch.no_grad():
            model.roi_heads.box_predictor.cls_score.weight.normal_(std=0.3)
        models.append(model)
    return models


def inputs_of(teachers, count=2):
    images = [{"image": random_image(seed=i)} for i in range(count)]
    samples = [make_sample(seed=i) for i in range(count)]
    return [
        LabelingInputs(teacher, teacher.detect(images), samples, member=i)
        for i, teacher in enumerate(teachers)
    ]


def make_method(**keys):
    keys = {"SEMI.METHOD": "CST", "SEMI.PSEUDO_LABEL_THRESHOLD": THRESHOLD} | keys
    return build_method(tiny_config(keys))


def same_labels(first, second):
    return all(
        torch.equal(a.gt_boxes.tensor, b.gt_boxes.tensor)
        and all(torch.equal(a.get(n), b.get(n)) for n in ("gt_classes", "gt_score", "gt_weight"))
        for a, b in zip(first, second, strict=True)
    )


def test_each_student_gets_the_detections_of_the_other_teacher(teachers):
    inputs = inputs_of(teachers)
    selected = make_method().select_for_members(inputs)
    for labels, labeling in zip(selected, reversed(inputs), strict=True):
        expected = [to_pseudo_labels(x, THRESHOLD) for x in labeling.output.detections]
        assert sum(map(len, expected)) > 0
        for a, b in zip(labels, expected, strict=True):
            assert torch.equal(a.gt_boxes.tensor, b.gt_boxes.tensor)
            assert torch.equal(a.gt_score, b.gt_score)


def test_weight_is_the_agreement_of_the_teachers_at_the_box(teachers):
    inputs = inputs_of(teachers)
    (labels, _), _ = make_method(**{"SEMI.CST.AGREEMENT_EXPONENT": 2.0}).select_for_members(inputs)
    boxes = labels.gt_boxes.tensor
    probabilities = [
        x.teacher.predict_rois(x.output, [boxes, boxes[:0]]).scores.softmax(dim=1).tolist()
        for x in reversed(inputs)
    ]
    for p, q, weight in zip(*probabilities, labels.gt_weight.tolist(), strict=True):
        divergence = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        assert weight == pytest.approx(math.exp(-2 * divergence), rel=1e-4)
    assert labels.gt_weight.min() < 0.99


def test_equal_teachers_and_a_zero_exponent_give_weight_1(teachers):
    for method, models in (
        (make_method(), [teachers[0]] * 2),
        (make_method(**{"SEMI.CST.AGREEMENT_EXPONENT": 0.0}), teachers),
    ):
        for labels in method.select_for_members(inputs_of(models)):
            weights = torch.cat([x.gt_weight for x in labels])
            assert len(weights) and torch.equal(weights, torch.ones(len(weights)))


def test_swapping_the_members_swaps_the_labels_exactly(teachers):
    method = make_method()
    first, second = method.select_for_members(inputs_of(teachers))
    swapped_first, swapped_second = method.select_for_members(inputs_of(teachers[::-1]))
    assert same_labels(first, swapped_second) and same_labels(second, swapped_first)
    assert not same_labels(first, second)


def test_no_pseudo_labels_are_possible(teachers):
    method = make_method(**{"SEMI.PSEUDO_LABEL_THRESHOLD": 1.0})
    for labels in method.select_for_members(inputs_of(teachers)):
        assert [len(x) for x in labels] == [0, 0]
        assert all(x.gt_weight.shape == (0,) for x in labels)


def test_divergence_of_two_classes():
    p, q = torch.tensor([[0.75, 0.25]]), torch.tensor([[0.5, 0.5]])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert_close(kl_divergence(p, q), torch.tensor([expected]))
    assert kl_divergence(p, p).item() == 0
    certain = torch.tensor([[1.0, 0.0]])
    assert_close(kl_divergence(certain, q), torch.tensor([math.log(2)]))
    assert kl_divergence(certain, 1 - certain).isfinite().all()


@each_labels
@pytest.mark.parametrize("gamma", [0.0, 1.5])
def test_classification_loss_weights_each_foreground_proposal(labels, gamma):
    weights = torch.rand(count(labels))
    proposals = sample(labels, make_predictor(focal_gamma=gamma), gt_weight=weights)
    expected = 0.0
    for row, label in enumerate(proposals.labels.tolist()):
        probability = proposals.predictions.scores[row].softmax(dim=0)[label].item()
        loss = (1 - probability) ** gamma * -math.log(probability)
        expected += loss * (weights[row].item() if label < K else 1.0)
    loss = make_method().classification_loss(proposals)
    assert_close(loss, torch.tensor(expected / count(labels)))
    assert make_method().losses(proposals).keys() == {"loss_cls"}


def test_focal_loss_without_weights_has_weights_of_1():
    logits, labels = torch.randn(6, K + 1), torch.tensor([0, 1, 2, K, K, 0])
    plain = focal_cross_entropy(logits, labels, gamma=1.5)
    weighted = focal_cross_entropy(logits, labels, gamma=1.5, weight=torch.ones(6))
    assert torch.equal(plain, weighted)
