"""Focal loss."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from locreweight.losses.focal import focal_cross_entropy


def test_gamma_zero_gives_the_mean_cross_entropy():
    logits, labels = torch.randn(9, 4), torch.randint(0, 4, (9,))
    loss = focal_cross_entropy(logits, labels, gamma=0.0)
    assert_close(loss, F.cross_entropy(logits, labels))


@pytest.mark.parametrize("gamma", [0.5, 1.5, 2.0])
def test_focal_loss_matches_its_definition(gamma):
    probabilities = [0.9, 0.5, 0.01]
    logits = torch.tensor([[math.log(p), math.log(1 - p)] for p in probabilities])
    expected = sum((1 - p) ** gamma * -math.log(p) for p in probabilities) / 3
    loss = focal_cross_entropy(logits, torch.zeros(3, dtype=torch.long), gamma=gamma)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("scale", [1e4, -1e4])
@pytest.mark.parametrize("gamma", [0.5, 1.5])
def test_extreme_logits_give_finite_losses_and_gradients(scale, gamma):
    logits = torch.tensor([[scale, 0.0]], requires_grad=True)
    loss = focal_cross_entropy(logits, torch.tensor([0]), gamma=gamma)
    loss.backward()
    assert loss.item() == pytest.approx(max(-scale, 0.0))
    assert logits.grad.isfinite().all()


def test_half_precision_is_computed_in_float32():
    logits, labels = torch.randn(6, 4), torch.randint(0, 4, (6,))
    loss = focal_cross_entropy(logits.half(), labels, gamma=1.5)
    assert loss.dtype == torch.float32
    assert_close(loss, focal_cross_entropy(logits.half().float(), labels, gamma=1.5))


def test_focal_loss_of_no_proposals_is_a_zero_that_keeps_the_graph():
    logits = torch.zeros(0, 4, requires_grad=True)
    loss = focal_cross_entropy(logits, torch.zeros(0, dtype=torch.long), gamma=1.5)
    loss.backward()
    assert loss.item() == 0 and logits.grad is not None
