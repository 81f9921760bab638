"""Localization quality score (Eq. 5) and KL regression loss (Eq. 8, 9)."""

import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.distributions import Normal
from torch.nn import functional as F
from torch.testing import assert_close

from locreweight.losses.localization import (
    LOG_VARIANCE_LIMIT,
    at_least_float32,
    kl_regression_loss,
    localization_quality,
)

HALVES = [torch.float16, torch.bfloat16]
EXTREMES = [LOG_VARIANCE_LIMIT, 11.0, 100.0, 1e4, math.inf]
each_half = pytest.mark.parametrize(
    ("dtype", "autocast"), [(dtype, autocast) for dtype in HALVES for autocast in (True, False)]
)
each_limit = pytest.mark.parametrize(("options", "limit"), [({}, 7.0), ({"limit": 2.0}, 2.0)])
each_outlier = pytest.mark.parametrize("value", [8.0, -8.0, 1e4, -1e4, math.inf, -math.inf])


def double(*shape, **options):
    return torch.randn(*shape, dtype=torch.float64, **options)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_becomes_float32(dtype):
    assert at_least_float32(torch.ones(2, dtype=dtype)).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_precision_is_unchanged(dtype):
    tensor = torch.ones(2, dtype=dtype)
    assert at_least_float32(tensor) is tensor


# localization_quality


@pytest.mark.parametrize(
    ("variances", "expected"),
    [
        ((1, 1, 1, 1), 1 / (1 + math.e)),
        ((1, 2, 3, 6), 1 / (1 + math.e**3)),
        ((0.5, 0.25, 1, 0.25), 1 / (1 + math.exp(0.5))),
        ((40, 4, 4, 32), 1 / (1 + math.exp(20))),
    ],
)
def test_quality_matches_equation_5(variances, expected):
    log_variance = torch.tensor(variances, dtype=torch.float64).log()
    assert localization_quality(log_variance).item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("shape", [(4,), (50, 4), (5, 3, 4), (0, 4), (0, 3, 4)])
def test_quality_matches_a_loop_over_boxes(shape):
    log_variance = double(*shape)
    expected = [
        1 / (1 + math.exp(sum(math.exp(v) for v in box) / 4))
        for box in log_variance.reshape(-1, 4).tolist()
    ]
    expected = torch.tensor(expected, dtype=torch.float64).reshape(shape[:-1])
    assert_close(localization_quality(log_variance), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("coordinate", range(4))
@pytest.mark.parametrize(
    ("dtype", "highest"),
    [(torch.float32, math.log(4 * 80)), (torch.float64, LOG_VARIANCE_LIMIT)],
)
def test_quality_decreases_with_each_variance(coordinate, dtype, highest):
    log_variance = torch.zeros(100, 4, dtype=dtype)
    log_variance[:, coordinate] = torch.linspace(-LOG_VARIANCE_LIMIT, highest, 100, dtype=dtype)
    assert (localization_quality(log_variance).diff() < 0).all()


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
@pytest.mark.parametrize("extreme", EXTREMES)
def test_quality_is_strictly_within_its_range(extreme, dtype, scale):
    signs = torch.tensor([[1, 1, 1, 1], [-1, -1, -1, -1], [1, -1, 1, -1]], dtype=dtype)
    quality = localization_quality(signs * extreme, scale=scale)
    assert ((quality > 0) & (quality < 0.5 * scale)).all()


def test_quality_does_not_depend_on_the_order_of_coordinates():
    log_variance = double(10, 4)
    shuffled = log_variance[:, [2, 0, 3, 1]]
    assert_close(localization_quality(shuffled), localization_quality(log_variance))


def test_quality_of_each_box_is_independent():
    log_variance, order = double(10, 4), torch.randperm(10)
    quality = localization_quality(log_variance)
    assert_close(localization_quality(log_variance[order]), quality[order])


@each_limit
@each_outlier
def test_quality_clamps_the_log_variance(value, options, limit):
    quality = localization_quality(torch.tensor([value, 0, 0, 0], dtype=torch.float64), **options)
    bounded = math.copysign(limit, value)
    expected = 1 / (1 + math.exp((math.exp(bounded) + 3) / 4))
    assert quality.item() == pytest.approx(expected, rel=1e-12, abs=0)


def test_scale_multiplies_the_quality():
    log_variance = double(10, 4)
    assert_close(
        localization_quality(log_variance, scale=2.0), 2 * localization_quality(log_variance)
    )


def test_quality_has_a_correct_gradient():
    assert gradcheck(localization_quality, double(3, 4, requires_grad=True))


@pytest.mark.parametrize("extreme", EXTREMES)
def test_quality_has_a_finite_gradient_for_extreme_values(extreme):
    log_variance = torch.tensor([[extreme] * 4, [-extreme] * 4], requires_grad=True)
    localization_quality(log_variance).sum().backward()
    assert log_variance.grad.isfinite().all()


@each_half
def test_quality_of_half_precision_is_computed_in_float32(dtype, autocast):
    log_variance = torch.randn(50, 4, dtype=dtype)
    expected = localization_quality(log_variance.float())
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        for given in (log_variance, log_variance.float()):
            assert_close(localization_quality(given), expected, rtol=0, atol=0)


# kl_regression_loss


@pytest.mark.parametrize(
    ("error", "variance", "expected"),
    [
        (0, 1, 0),
        (0.5, 1, 0.125),
        (1, 1, 0.5),
        (3, 1, 2.5),
        (0, 4, math.log(2)),
        (0.5, 4, 0.125 / 4 + math.log(2)),
        (3, 4, 2.5 / 4 + math.log(2)),
        (0, 0.25, -math.log(2)),
        (2, 0.25, 1.5 * 4 - math.log(2)),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_loss_matches_equations_8_and_9(error, variance, expected, sign):
    target = torch.full((1, 4), 10.0, dtype=torch.float64)
    log_variance = torch.full_like(target, math.log(variance))
    loss = kl_regression_loss(target + sign * error, target, log_variance)
    assert_close(loss, torch.full_like(target, expected), rtol=1e-13, atol=1e-13)


def test_loss_for_small_errors_is_the_negative_log_density_of_the_target():
    """Up to a constant that the paper drops. The target is a point, so KL = -log density."""
    target, log_variance = double(50, 4), double(50, 4)
    prediction = target + torch.empty_like(target).uniform_(-1, 1)
    density = Normal(prediction, log_variance.exp().sqrt()).log_prob(target)
    expected = -density - 0.5 * math.log(2 * math.pi)
    assert_close(kl_regression_loss(prediction, target, log_variance), expected)


@pytest.mark.parametrize("num_boxes", [0, 1, 50])
def test_loss_matches_a_loop_over_coordinates(num_boxes):
    prediction, target, log_variance = double(3, num_boxes, 4) * 2
    loss = kl_regression_loss(prediction, target, log_variance)
    assert loss.shape == (num_boxes, 4)
    for row in range(num_boxes):
        for k in range(4):
            error = abs(prediction[row, k].item() - target[row, k].item())
            distance = error**2 / 2 if error <= 1 else error - 0.5
            expected = math.exp(-log_variance[row, k]) * distance + log_variance[row, k].item() / 2
            assert loss[row, k].item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_loss_with_variance_1_equals_smooth_l1():
    prediction, target = torch.randn(2, 50, 4) * 2
    expected = F.smooth_l1_loss(prediction, target, reduction="none", beta=1.0)
    loss = kl_regression_loss(prediction, target, torch.zeros(50, 4))
    assert_close(loss, expected, rtol=0, atol=0)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("log_variance", [-2.0, 0.0, 2.0])
def test_loss_and_its_slope_are_continuous_at_an_error_of_1(sign, log_variance):
    step = 1e-12
    error = torch.tensor([[1 - step, 1, 1 + step, 1 + 2 * step]], dtype=torch.float64) * sign
    error.requires_grad_()
    loss = kl_regression_loss(error, torch.zeros_like(error), torch.full_like(error, log_variance))
    (slope,) = torch.autograd.grad(loss.sum(), error)
    precision = math.exp(-log_variance)
    at_one = torch.full_like(error, precision / 2 + log_variance / 2)
    assert_close(loss, at_one, rtol=0, atol=1e-10)
    assert_close(slope, torch.full_like(error, sign * precision), rtol=0, atol=1e-10)


@pytest.mark.parametrize("error", [0.1, 0.9, 1.0, 5.0])
def test_loss_is_minimal_if_the_variance_is_twice_the_smooth_l1_distance(error):
    prediction = torch.full((1, 4), error, dtype=torch.float64)
    target = torch.zeros_like(prediction)
    best = (2 * F.smooth_l1_loss(prediction, target, reduction="none")).log().requires_grad_()
    loss = kl_regression_loss(prediction, target, best)
    (slope,) = torch.autograd.grad(loss.sum(), best)
    assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-14)
    for shift in (-0.1, 0.1):
        assert (kl_regression_loss(prediction, target, best + shift) > loss).all()


def test_loss_of_each_coordinate_is_independent():
    tensors, order = double(3, 10, 4), torch.randperm(40)
    shuffled = tensors.reshape(3, 40)[:, order].reshape(3, 10, 4)
    expected = kl_regression_loss(*tensors).reshape(40)[order].reshape(10, 4)
    assert_close(kl_regression_loss(*shuffled), expected)


def test_loss_has_correct_gradients():
    tensors = (double(5, 4) * 2, double(5, 4), double(5, 4))
    assert gradcheck(kl_regression_loss, [tensor.requires_grad_() for tensor in tensors])


@each_limit
@each_outlier
def test_loss_clamps_the_log_variance(value, options, limit):
    target = torch.zeros(1, 4, dtype=torch.float64)
    loss = kl_regression_loss(target + 1, target, torch.full_like(target, value), **options)
    bounded = math.copysign(limit, value)
    expected = math.exp(-bounded) / 2 + bounded / 2
    assert_close(loss, torch.full_like(target, expected), rtol=1e-12, atol=0)


@pytest.mark.parametrize("error", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("extreme", EXTREMES)
def test_loss_and_its_gradients_are_finite_for_extreme_values(extreme, error):
    log_variance = torch.tensor([[extreme, -extreme] * 2], requires_grad=True)
    prediction = torch.full((1, 4), error, requires_grad=True)
    loss = kl_regression_loss(prediction, torch.zeros(1, 4), log_variance)
    loss.sum().backward()
    for tensor in (loss, prediction.grad, log_variance.grad):
        assert tensor.isfinite().all()


@each_half
def test_loss_of_half_precision_is_computed_in_float32(dtype, autocast):
    tensors = (torch.randn(3, 50, 4) * 3).to(dtype)
    expected = kl_regression_loss(*tensors.float())
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        for given in (tensors, tensors.float()):
            assert_close(kl_regression_loss(*given), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "shapes", [((3, 4), (1, 4), (3, 4)), ((3, 4), (3, 4), (3, 1)), ((4,), (3, 4), (3, 4))]
)
def test_loss_rejects_shapes_that_would_broadcast(shapes):
    with pytest.raises(ValueError, match="must have the same shape") as error:
        kl_regression_loss(*map(torch.zeros, shapes))
    assert all(str(shape) in str(error.value) for shape in shapes)
