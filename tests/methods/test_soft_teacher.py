"""Soft Teacher's formulas, against numbers worked out by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from locreweight.methods.soft_teacher import (
    background_weighted_cross_entropy,
    box_regression_variance,
    jittered,
)

EVEN = [0.0, 0.0, 0.0]  # logits of two classes and background: log 3 each


def test_foreground_counts_alike_and_background_by_its_share():
    logits = torch.tensor([EVEN, [math.log(2), 0, 0], EVEN, [0, 0, math.log(2)]])
    labels = torch.tensor([0, 0, 2, 2])
    score = torch.tensor([0.9, 0.9, 0.2, 0.6])  # those of foreground proposals do not count
    loss = background_weighted_cross_entropy(logits, labels, score)
    expected = (math.log(3) + math.log(2)) / 2 + 0.25 * math.log(3) + 0.75 * math.log(2)
    assert loss.item() == pytest.approx(expected)


def test_the_sum_can_be_divided_by_all_weights_together():
    logits = torch.tensor([EVEN, [math.log(2), 0, 0], EVEN, [0, 0, math.log(2)]])
    loss = background_weighted_cross_entropy(
        logits,
        torch.tensor([0, 0, 2, 2]),
        torch.tensor([0.9, 0.9, 0.2, 0.6]),
        per_sampled_proposal=True,
    )
    expected = (math.log(3) + math.log(2) + 0.2 * math.log(3) + 0.6 * math.log(2)) / 2.8
    assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("labels", [[0, 1], [2, 2], []])
def test_a_set_that_is_empty_or_without_score_is_a_zero_that_keeps_the_graph(labels):
    logits = torch.zeros(len(labels), 3, requires_grad=True)
    score = torch.zeros(len(labels))
    loss = background_weighted_cross_entropy(logits, torch.tensor(labels, dtype=torch.long), score)
    expected = math.log(3) if 0 in labels else 0.0  # the mean of two equal losses
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_scores_pass_no_gradient():
    score = torch.rand(3, requires_grad=True)
    logits = torch.randn(3, 3, requires_grad=True)
    background_weighted_cross_entropy(logits, torch.tensor([0, 2, 2]), score).backward()
    assert score.grad is None and logits.grad is not None


def test_jittered_copies_stay_within_the_share_of_the_boxs_size():
    boxes = torch.tensor([[10.0, 20, 30, 120], [0, 0, 1, 1]])
    copies = jittered(boxes, 500, 0.06)
    assert copies.shape == (2, 500, 4)
    moves = copies - boxes[:, None]
    limits = torch.tensor([[1.2, 6.0, 1.2, 6.0], [0.06, 0.06, 0.06, 0.06]])
    assert (moves.abs().amax(dim=1) <= limits + 1e-5).all()
    assert (moves.abs().amax(dim=1) >= 0.95 * limits).all()
    assert (moves.mean(dim=1).abs() < 0.1 * limits).all()
    assert jittered(torch.zeros(0, 4), 10, 0.06).shape == (0, 10, 4)


def test_variance_is_the_mean_deviation_in_units_of_half_width_plus_height():
    box = torch.tensor([[0.0, 0, 30, 10]])  # half of width plus height: 20
    refined = torch.tensor([[[0.0, 0, 30, 10], [2, 0, 34, 10]]])
    # Deviations of two values d apart: d / sqrt(2).
    expected = (2 / math.sqrt(2) + 4 / math.sqrt(2)) / 4 / 20
    assert_close(box_regression_variance(box, refined), torch.tensor([expected]))


def test_re_predictions_that_agree_have_no_variance_and_size_does_not_matter():
    box = torch.tensor([[5.0, 5, 25, 45]])
    same = box[:, None].expand(-1, 10, -1)
    assert box_regression_variance(box, same).item() == 0
    refined = same + torch.randn(1, 10, 4)
    once = box_regression_variance(box, refined)
    assert_close(box_regression_variance(7 * box, 7 * refined), once)
    assert box_regression_variance(torch.zeros(0, 4), torch.zeros(0, 10, 4)).shape == (0,)
