"""Weights and losses of LER (Eq. 11) and PRC (Eq. 12-14)."""

import math

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.testing import assert_close

from locreweight.losses.reweighting import (
    proposal_reliability,
    quality_weighted_box_loss,
    reliability_weighted_cross_entropy,
)

HALVES = [torch.float16, torch.bfloat16]
K = 3
LABELS = {
    "both": [0, K, 1, K, 2, K, K],
    "foreground only": [0, 1, 2, 2],
    "background only": [K, K, K],
    "one of each": [2, K],
    "none": [],
}
each_label_set = pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS.keys())

each_half = pytest.mark.parametrize(
    ("dtype", "autocast"), [(dtype, autocast) for dtype in HALVES for autocast in (True, False)]
)
each_normalizer = pytest.mark.parametrize("per_sampled_proposal", [False, True])


def as_labels(labels):
    return torch.tensor(labels, dtype=torch.int64)


def teacher_outputs(num_proposals, columns=K, dtype=torch.float64):
    probabilities = torch.randn(num_proposals, K + 1, dtype=dtype).softmax(dim=1)
    return probabilities, torch.randn(num_proposals, columns, 4, dtype=dtype)


def student_outputs(num_proposals):
    """Logits and reliability scores."""
    logits = torch.randn(num_proposals, K + 1, dtype=torch.float64)
    return logits, torch.rand(num_proposals, dtype=torch.float64)


def box_losses(num_boxes):
    """Losses of foreground boxes and quality scores of their pseudo-labels."""
    loss = torch.rand(num_boxes, 4, dtype=torch.float64)
    return loss, torch.rand(num_boxes, dtype=torch.float64) / 2


# proposal_reliability


@pytest.mark.parametrize(
    ("label", "expected"),
    [(0, 0.5 / (1 + math.e**3)), (1, 0.5 / (1 + math.e**3)), (2, 0.3)],
)
def test_reliability_matches_equations_12_and_13(label, expected):
    """Class 1 is more likely than class 0. Its variances are 1, 2, 3, 6, with a mean of 3."""
    probabilities = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64)
    log_variance = torch.tensor([[[1, 1, 1, 1], [1, 2, 3, 6]]], dtype=torch.float64).log()
    weight = proposal_reliability(probabilities, log_variance, as_labels([label]))
    assert_close(weight, torch.tensor([expected], dtype=torch.float64))


@each_label_set
@pytest.mark.parametrize("columns", [K, 1])
def test_reliability_matches_a_loop_over_proposals(labels, columns):
    probabilities, log_variance = teacher_outputs(len(labels), columns)
    weights = proposal_reliability(probabilities, log_variance, as_labels(labels))
    expected = []
    for p, variances, label in zip(
        probabilities.tolist(), log_variance.exp().tolist(), labels, strict=True
    ):
        best = max(range(K), key=lambda k: p[k])
        mean = sum(variances[best if columns == K else 0]) / 4
        expected.append(p[K] if label == K else p[best] / (1 + math.exp(mean)))
    assert_close(weights, torch.tensor(expected, dtype=torch.float64))


def test_class_agnostic_variance_is_used_for_every_class():
    probabilities, shared = teacher_outputs(7, columns=1)
    labels = as_labels(LABELS["both"])
    assert_close(
        proposal_reliability(probabilities, shared, labels),
        proposal_reliability(probabilities, shared.expand(-1, K, -1), labels),
    )


def test_foreground_reliability_does_not_depend_on_the_assigned_class():
    outputs = teacher_outputs(5)
    first, *others = (proposal_reliability(*outputs, torch.full((5,), k)) for k in range(K))
    for other in others:
        assert_close(other, first, rtol=0, atol=0)


@pytest.mark.parametrize("best", range(K + 1))
@pytest.mark.parametrize("label", range(K + 1))
def test_reliability_for_probabilities_of_0_and_1(best, label):
    """All variances are 1."""
    probabilities = torch.eye(K + 1)[[best]]
    weight = proposal_reliability(probabilities, torch.zeros(1, K, 4), as_labels([label]))
    foreground = 0.0 if best == K else torch.sigmoid(torch.tensor(-1.0)).item()
    assert weight.item() == (float(best == K) if label == K else foreground)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
@pytest.mark.parametrize("extreme", [7.0, -7.0, 1e4, -1e4, math.inf, -math.inf])
def test_reliability_is_within_0_and_1_for_extreme_values(extreme, dtype):
    probabilities = torch.eye(K + 1, dtype=dtype)
    log_variance = torch.full((K + 1, K, 4), extreme, dtype=dtype)
    for label in range(K + 1):
        labels = torch.full((K + 1,), label)
        weights = proposal_reliability(probabilities, log_variance, labels, scale=2.0)
        assert ((weights >= 0) & (weights <= 1)).all()


def test_reliability_of_each_proposal_is_independent():
    probabilities, log_variance = teacher_outputs(7)
    labels, order = as_labels(LABELS["both"]), torch.randperm(7)
    weights = proposal_reliability(probabilities, log_variance, labels)
    shuffled = proposal_reliability(probabilities[order], log_variance[order], labels[order])
    assert_close(shuffled, weights[order])


def test_reliability_does_not_depend_on_the_order_of_foreground_classes():
    probabilities, log_variance = teacher_outputs(7)
    labels, order = as_labels(LABELS["both"]), [2, 0, 1]
    weights = proposal_reliability(probabilities, log_variance, labels)
    assert_close(
        proposal_reliability(probabilities[:, [*order, K]], log_variance[:, order], labels), weights
    )


def test_scale_and_limit_affect_foreground_proposals_only():
    probabilities, log_variance = teacher_outputs(7)
    labels = as_labels(LABELS["both"])
    plain = proposal_reliability(probabilities, log_variance.clamp(-0.5, 0.5), labels)
    factor = torch.where(labels == K, 1.0, 2.0)
    changed = proposal_reliability(probabilities, log_variance, labels, limit=0.5, scale=2.0)
    assert_close(changed, plain * factor)


@each_label_set
def test_reliability_has_no_gradient(labels):
    outputs = [tensor.requires_grad_() for tensor in teacher_outputs(len(labels))]
    assert not proposal_reliability(*outputs, as_labels(labels)).requires_grad


@each_half
def test_reliability_of_half_precision_is_computed_in_float32(dtype, autocast):
    outputs = [tensor.to(dtype) for tensor in teacher_outputs(7)]
    full = [tensor.float() for tensor in outputs]
    labels = as_labels(LABELS["both"])
    expected = proposal_reliability(*full, labels)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        for given in (outputs, full):
            assert_close(proposal_reliability(*given, labels), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("log_variance", "labels"),
    [((5, 2, 4), (5,)), ((4, K, 4), (5,)), ((5, K), (5,)), ((5, K, 4), (4,)), ((5, K, 4), (5, 1))],
)
def test_reliability_rejects_inconsistent_shapes(log_variance, labels):
    with pytest.raises(ValueError, match="log_variance must be") as error:
        proposal_reliability(
            torch.ones(5, K + 1), torch.zeros(log_variance), torch.zeros(labels, dtype=torch.int64)
        )
    assert all(str(shape) in str(error.value) for shape in ((5, K + 1), log_variance, labels))


# reliability_weighted_cross_entropy


@pytest.mark.parametrize(
    ("per_sampled_proposal", "expected"), [(False, 0.3 + 0.7), (True, 2.7 / 5)]
)
def test_cross_entropy_matches_equation_14(per_sampled_proposal, expected):
    """The mean weight is 0.3 in the foreground, 0.7 in the background. Each loss is log 2."""
    logits = torch.zeros(5, 2, dtype=torch.float64)
    reliability = torch.tensor([0.2, 0.5, 0.4, 0.6, 1.0], dtype=torch.float64)
    loss = reliability_weighted_cross_entropy(
        logits,
        as_labels([0, 1, 0, 1, 1]),
        reliability,
        per_sampled_proposal=per_sampled_proposal,
    )
    assert loss.item() == pytest.approx(expected * math.log(2), rel=1e-13)


@each_label_set
@each_normalizer
def test_cross_entropy_matches_a_loop_over_proposals(labels, per_sampled_proposal):
    logits, reliability = student_outputs(len(labels))
    sums, counts = {True: 0.0, False: 0.0}, {True: 0, False: 0}
    for scores, weight, label in zip(logits.tolist(), reliability.tolist(), labels, strict=True):
        cross_entropy = math.log(sum(map(math.exp, scores))) - scores[label]
        sums[label == K] += weight * cross_entropy
        counts[label == K] += 1
    if per_sampled_proposal:
        expected = sum(sums.values()) / max(len(labels), 1)
    else:
        expected = sum(sums[kind] / max(counts[kind], 1) for kind in sums)
    loss = reliability_weighted_cross_entropy(
        logits, as_labels(labels), reliability, per_sampled_proposal=per_sampled_proposal
    )
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@each_normalizer
def test_cross_entropy_of_no_proposals_is_a_zero_that_keeps_the_graph(per_sampled_proposal):
    layer = nn.Linear(5, K + 1)
    loss = reliability_weighted_cross_entropy(
        layer(torch.zeros(0, 5)),
        as_labels([]),
        torch.zeros(0),
        per_sampled_proposal=per_sampled_proposal,
    )
    loss.backward()
    assert loss.item() == 0
    for parameter in layer.parameters():
        assert_close(parameter.grad, torch.zeros_like(parameter), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["foreground only", "background only"])
def test_empty_set_adds_zero_to_the_mean_of_the_other_set(kind):
    labels = LABELS[kind]
    logits, reliability = student_outputs(len(labels))
    equation, sampled = (
        reliability_weighted_cross_entropy(
            logits, as_labels(labels), reliability, per_sampled_proposal=per_sampled_proposal
        )
        for per_sampled_proposal in (False, True)
    )
    assert_close(equation, sampled, rtol=0, atol=0)


@each_label_set
@each_normalizer
def test_cross_entropy_has_a_correct_gradient(labels, per_sampled_proposal):
    logits, reliability = student_outputs(len(labels))
    assert gradcheck(
        lambda scores: reliability_weighted_cross_entropy(
            scores, as_labels(labels), reliability, per_sampled_proposal=per_sampled_proposal
        ),
        logits.requires_grad_(),
    )


@each_normalizer
def test_cross_entropy_gives_no_gradient_to_the_reliability(per_sampled_proposal):
    logits, reliability = (tensor.requires_grad_() for tensor in student_outputs(7))
    reliability_weighted_cross_entropy(
        logits,
        as_labels(LABELS["both"]),
        reliability,
        per_sampled_proposal=per_sampled_proposal,
    ).backward()
    assert reliability.grad is None
    assert logits.grad.abs().sum() > 0


@each_normalizer
def test_proposals_with_zero_reliability_get_no_gradient(per_sampled_proposal):
    logits, reliability = student_outputs(7)
    reliability[2:4] = 0
    reliability_weighted_cross_entropy(
        logits.requires_grad_(),
        as_labels(LABELS["both"]),
        reliability,
        per_sampled_proposal=per_sampled_proposal,
    ).backward()
    no_gradient = logits.grad.eq(0).all(dim=1)
    assert no_gradient.tolist() == [False, False, True, True, False, False, False]


@each_normalizer
def test_cross_entropy_does_not_depend_on_the_order_of_proposals(per_sampled_proposal):
    logits, reliability = student_outputs(7)
    labels, order = as_labels(LABELS["both"]), torch.randperm(7)
    options = {"per_sampled_proposal": per_sampled_proposal}
    assert_close(
        reliability_weighted_cross_entropy(
            logits[order], labels[order], reliability[order], **options
        ),
        reliability_weighted_cross_entropy(logits, labels, reliability, **options),
    )


def test_cross_entropy_is_exact_for_extreme_logits():
    """The first prediction is right, the second one is wrong."""
    logits = torch.tensor([[1e4, -1e4], [1e4, -1e4]], requires_grad=True)
    loss = reliability_weighted_cross_entropy(logits, as_labels([0, 1]), torch.tensor([1.0, 0.5]))
    loss.backward()
    assert loss.item() == 0.5 * 2e4
    assert_close(logits.grad, torch.tensor([[0, 0], [0.5, -0.5]]), rtol=0, atol=0)


@each_half
def test_cross_entropy_of_half_precision_is_computed_in_float32(dtype, autocast):
    outputs = [tensor.to(dtype) for tensor in student_outputs(7)]
    full = [tensor.float() for tensor in outputs]
    labels = as_labels(LABELS["both"])
    expected = reliability_weighted_cross_entropy(full[0], labels, full[1])
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        for logits, reliability in (outputs, full):
            loss = reliability_weighted_cross_entropy(logits, labels, reliability)
            assert_close(loss, expected, rtol=0, atol=0)


# quality_weighted_box_loss


@pytest.mark.parametrize("count", [int, torch.tensor], ids=["number", "tensor"])
@pytest.mark.parametrize(("num_foreground", "expected"), [(2, 1.5), (6, 0.5), (1, 3.0), (0, 3.0)])
def test_box_loss_matches_equation_11(num_foreground, expected, count):
    """The sum over coordinates and boxes is divided by the given number, at least by 1."""
    quality = torch.tensor([0.5, 0.25])
    loss = quality_weighted_box_loss(torch.ones(2, 4), quality, count(num_foreground))
    assert loss.shape == ()
    assert loss.item() == expected


@pytest.mark.parametrize("num_boxes", [0, 1, 7])
def test_box_loss_matches_a_loop_over_boxes(num_boxes):
    loss, quality = box_losses(num_boxes)
    expected = sum(q * sum(box) for q, box in zip(quality.tolist(), loss.tolist(), strict=True))
    result = quality_weighted_box_loss(loss, quality, num_boxes)
    assert result.item() == pytest.approx(expected / max(num_boxes, 1), rel=1e-12)


@pytest.mark.parametrize("num_foreground", [0, torch.tensor(0)], ids=["number", "tensor"])
def test_box_loss_of_no_boxes_is_a_zero_that_keeps_the_graph(num_foreground):
    layer = nn.Linear(5, 4)
    loss = quality_weighted_box_loss(layer(torch.zeros(0, 5)), torch.zeros(0), num_foreground)
    loss.backward()
    assert loss.item() == 0
    for parameter in layer.parameters():
        assert_close(parameter.grad, torch.zeros_like(parameter), rtol=0, atol=0)


def test_box_loss_has_a_correct_gradient():
    loss, quality = box_losses(5)
    assert gradcheck(lambda x: quality_weighted_box_loss(x, quality, 5), loss.requires_grad_())


def test_box_loss_gives_no_gradient_to_the_quality():
    loss, quality = (tensor.requires_grad_() for tensor in box_losses(5))
    quality_weighted_box_loss(loss, quality, 5).backward()
    assert quality.grad is None
    assert_close(loss.grad, quality.detach()[:, None].expand(5, 4) / 5)


def test_box_loss_does_not_depend_on_the_order_of_boxes():
    loss, quality = box_losses(5)
    order = torch.randperm(5)
    assert_close(
        quality_weighted_box_loss(loss[order], quality[order], 5),
        quality_weighted_box_loss(loss, quality, 5),
    )


@each_half
def test_box_loss_of_half_precision_is_computed_in_float32(dtype, autocast):
    """The sum of the losses would overflow in half precision."""
    loss, quality = (tensor.to(dtype) for tensor in box_losses(50))
    loss = loss * 1e4
    expected = quality_weighted_box_loss(loss.float(), quality.float(), 50)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        for given in ((loss, quality), (loss.float(), quality.float())):
            assert_close(quality_weighted_box_loss(*given, 50), expected, rtol=0, atol=0)


def test_weights_with_a_different_shape_are_rejected():
    logits, labels = torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"reliability is \(4, 1\), labels \(4,\)"):
        reliability_weighted_cross_entropy(logits, labels, torch.ones(4, 1))
    with pytest.raises(ValueError, match=r"quality is \(1,\), loss \(4, 4\)"):
        quality_weighted_box_loss(torch.ones(4, 4), torch.ones(1), 4)
