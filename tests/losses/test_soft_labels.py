"""Soft class labels, compared with numbers computed by hand and with PyTorch's cross-entropy."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from locreweight.losses.soft_labels import sharpen, soft_cross_entropy

K = 3


@pytest.mark.parametrize("score", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_half_temperature_squares_the_odds(score):
    squares = score**2, (1 - score) ** 2
    expected = squares[0] / sum(squares)
    assert_close(sharpen(torch.tensor(score), 0.5), torch.tensor(expected))


def test_temperature_1_changes_nothing():
    score = torch.rand(50)
    assert_close(sharpen(score, 1.0), score)


def test_half_precision_is_sharpened_in_float32():
    assert sharpen(torch.tensor([0.999], dtype=torch.float16), 0.5).dtype == torch.float32


def test_loss_is_the_cross_entropy_to_two_classes():
    logits, labels = torch.randn(6, K + 1), torch.tensor([0, 1, 2, K, K, 1])
    probability = torch.tensor([1.0, 0.7, 0.0, 1.0, 0.3, 0.5])
    target = torch.zeros(6, K + 1)
    for i, (label, p) in enumerate(zip(labels.tolist(), probability.tolist(), strict=True)):
        target[i, label] += p
        target[i, K] += 1 - p
    expected = F.cross_entropy(logits, target, reduction="none")
    assert_close(soft_cross_entropy(logits, labels, probability), expected)


def test_certain_labels_give_the_plain_cross_entropy():
    logits, labels = torch.randn(5, K + 1), torch.tensor([0, 1, 2, K, 0])
    expected = F.cross_entropy(logits, labels, reduction="none")
    assert_close(soft_cross_entropy(logits, labels, torch.ones(5)), expected)


def test_gradient_vanishes_at_the_target_and_does_not_reach_the_probability():
    probability = torch.tensor([0.75], requires_grad=True)
    logits = torch.tensor([[math.log(0.75), -50.0, -50.0, math.log(0.25)]], requires_grad=True)
    soft_cross_entropy(logits, torch.tensor([0]), probability).sum().backward()
    assert_close(logits.grad, torch.zeros(1, K + 1), atol=1e-6, rtol=0)
    assert probability.grad is None


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_extreme_logits_and_probabilities_are_finite(probability):
    logits = torch.tensor([[1e4, -1e4, 0, 0]], requires_grad=True)
    loss = soft_cross_entropy(logits, torch.tensor([1]), torch.tensor([probability]))
    loss.sum().backward()
    assert loss.isfinite().all() and logits.grad.isfinite().all()


def test_no_proposals():
    loss = soft_cross_entropy(
        torch.zeros(0, K + 1), torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    )
    assert loss.shape == (0,)
