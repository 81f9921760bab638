"""Formulas of Soft Teacher, compared with numbers computed by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from locreweight.methods.soft_teacher import (
    background_weighted_cross_entropy,
    box_regression_variance,
    jitter_boxes,
)

UNIFORM = [0.0, 0.0, 0.0]  # logits of two classes and background: cross-entropy log 3 each


@pytest.mark.parametrize(
    ("per_sampled_proposal", "expected"),
    [
        (False, (math.log(3) + math.log(2)) / 2 + 0.25 * math.log(3) + 0.75 * math.log(2)),
        (True, (math.log(3) + math.log(2) + 0.2 * math.log(3) + 0.6 * math.log(2)) / 2.8),
    ],
)
def test_background_proposals_are_weighted_by_their_score(per_sampled_proposal, expected):
    logits = torch.tensor([UNIFORM, [math.log(2), 0, 0], UNIFORM, [0, 0, math.log(2)]])
    loss = background_weighted_cross_entropy(
        logits,
        torch.tensor([0, 0, 2, 2]),
        torch.tensor([0.9, 0.9, 0.2, 0.6]),  # the foreground's scores have no effect
        per_sampled_proposal=per_sampled_proposal,
    )
    assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("per_sampled_proposal", [False, True])
def test_one_proposal_has_its_whole_loss(per_sampled_proposal):
    loss = background_weighted_cross_entropy(
        torch.tensor([UNIFORM]),
        torch.tensor([0]),
        torch.tensor([0.9]),
        per_sampled_proposal=per_sampled_proposal,
    )
    assert loss.item() == pytest.approx(math.log(3))


@pytest.mark.parametrize("labels", [[0, 1], [2, 2], []])
def test_empty_sets_and_zero_scores_give_a_zero_that_keeps_the_graph(labels):
    logits = torch.zeros(len(labels), 3, requires_grad=True)
    score = torch.zeros(len(labels))
    loss = background_weighted_cross_entropy(logits, torch.tensor(labels, dtype=torch.long), score)
    expected = math.log(3) if 0 in labels else 0.0  # the mean of two equal losses
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_background_scores_get_no_gradient():
    score = torch.rand(3, requires_grad=True)
    logits = torch.randn(3, 3, requires_grad=True)
    background_weighted_cross_entropy(logits, torch.tensor([0, 2, 2]), score).backward()
    assert score.grad is None and logits.grad is not None


def test_jitter_is_uniform_within_a_fraction_of_the_box_size():
    boxes = torch.tensor([[10.0, 20, 30, 120], [0, 0, 1, 1]])
    copies = jitter_boxes(boxes, 500, 0.06)
    assert copies.shape == (2, 500, 4)
    offsets = copies - boxes[:, None]
    limits = torch.tensor([[1.2, 6.0, 1.2, 6.0], [0.06, 0.06, 0.06, 0.06]])
    assert (offsets.abs().amax(dim=1) <= limits + 1e-5).all()
    assert (offsets.abs().amax(dim=1) >= 0.95 * limits).all()
    assert (offsets.mean(dim=1).abs() < 0.1 * limits).all()
    assert jitter_boxes(torch.zeros(0, 4), 10, 0.06).shape == (0, 10, 4)


def test_variance_is_the_mean_deviation_over_half_of_width_plus_height():
    box = torch.tensor([[0.0, 0, 30, 10]])  # half of width plus height: 20
    regressed = torch.tensor([[[0.0, 0, 30, 10], [2, 0, 34, 10], [4, 0, 38, 10]]])
    # The deviation of three values that are d apart is d.
    expected = (2 + 4) / 4 / 20
    assert_close(box_regression_variance(box, regressed), torch.tensor([expected]))


def test_variance_is_zero_for_identical_boxes_and_independent_of_scale():
    box = torch.tensor([[5.0, 5, 25, 45]])
    identical = box[:, None].expand(-1, 10, -1)
    assert box_regression_variance(box, identical).item() == 0
    regressed = identical + torch.randn(1, 10, 4)
    variance = box_regression_variance(box, regressed)
    assert_close(box_regression_variance(7 * box, 7 * regressed), variance)
    assert box_regression_variance(torch.zeros(0, 4), torch.zeros(0, 10, 4)).shape == (0,)
