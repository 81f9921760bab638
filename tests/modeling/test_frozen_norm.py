"""Frozen batch norm folded into convolutions: the same numbers, gradients and names."""

import copy

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d, get_norm
from detectron2.modeling import build_backbone

from locreweight.modeling.frozen_norm import ConvWithFrozenNorm, fold_frozen_norms
from tests.modeling.tiny_model import tiny_config, tiny_model


def frozen_norm(channels, seed):
    generator = torch.Generator().manual_seed(seed)
    norm = FrozenBatchNorm2d(channels)
    for buffer in norm.buffers():
        buffer.copy_(torch.rand(channels, generator=generator) + 0.5)
    norm.bias -= 1.0
    return norm


def a_convolution(activation=None, **arguments):
    norm = frozen_norm(6, seed=1)
    return Conv2d(4, 6, 3, norm=norm, activation=activation, bias=False, **arguments)


def outputs_and_gradients(model, x):
    x = x.clone().requires_grad_()
    out = model(x)
    (out.cos() * torch.arange(out.numel()).view_as(out)).sum().backward()
    return out, x.grad, *(p.grad for p in model.parameters())


@pytest.mark.parametrize("arguments", [{}, {"stride": 2, "padding": 1}, {"groups": 2}])
@pytest.mark.parametrize("activation", [None, torch.relu])
def test_output_and_all_gradients_are_those_of_the_two_operations(activation, arguments):
    plain = a_convolution(activation, **arguments).double()
    folded = copy.deepcopy(plain)
    fold_frozen_norms(folded)
    assert type(folded) is ConvWithFrozenNorm
    x = torch.randn(2, 4, 9, 7, dtype=torch.float64)
    for expected, found in zip(
        outputs_and_gradients(plain, x), outputs_and_gradients(folded, x), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_an_analytic_value():
    """A 1x1 convolution by 3, then (y - 2) / sqrt(4) * 5 + 7."""
    convolution = Conv2d(1, 1, 1, bias=False, norm=FrozenBatchNorm2d(1, eps=0.0))
    with torch.no_grad():
        convolution.weight.fill_(3.0)
        for name, value in {
            "running_mean": 2.0,
            "running_var": 4.0,
            "weight": 5.0,
            "bias": 7.0,
        }.items():
            getattr(convolution.norm, name).fill_(value)
    fold_frozen_norms(convolution)
    assert convolution(torch.full((1, 1, 1, 1), 10.0)).item() == pytest.approx(77.0)


@pytest.mark.parametrize("norm", ["BN", "GN", ""])
def test_other_norms_stay_as_they_are(norm):
    convolution = Conv2d(4, 32, 3, norm=get_norm(norm, 32))
    fold_frozen_norms(convolution)
    assert type(convolution) is Conv2d


def test_a_bias_beside_the_norm_or_a_subclass_stays_as_it_is():
    class Other(Conv2d):
        pass

    biased = Conv2d(4, 6, 3, norm=FrozenBatchNorm2d(6))
    other = Other(4, 6, 3, norm=FrozenBatchNorm2d(6), bias=False)
    for module, kind in ((biased, Conv2d), (other, Other)):
        fold_frozen_norms(module)
        assert type(module) is kind


@pytest.mark.parametrize("fold", [True, False])
def test_the_key_decides_and_changes_neither_names_nor_features(fold):
    settings = {"MODEL.RESNETS.NORM": "FrozenBN", "MODEL.FOLD_FROZEN_NORM": fold}
    model = tiny_model(settings).eval()
    kinds = {type(m) for m in model.backbone.modules()}
    assert (ConvWithFrozenNorm in kinds) == fold
    plain = build_backbone(tiny_config(settings)).eval()
    plain.load_state_dict(model.backbone.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for name, expected in plain(x).items():
            torch.testing.assert_close(model.backbone(x)[name], expected, rtol=1e-4, atol=1e-4)


def test_half_precision_reaches_the_convolution():
    model = a_convolution()
    fold_frozen_norms(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(torch.randn(1, 4, 8, 8))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert model.weight.grad.dtype == torch.float32
