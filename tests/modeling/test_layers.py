"""Replacements of Detectron2 layers: same results, gradients and parameter names."""

import copy

import pytest
import torch
from detectron2.layers import CNNBlockBase, Conv2d, FrozenBatchNorm2d, ROIAlign, get_norm
from detectron2.modeling import build_backbone
from detectron2.utils.events import EventStorage

from locreweight.modeling.layers import (
    FoldedConv2d,
    ParallelROIAlign,
    fold_frozen_batchnorm,
    parallelize_roi_align,
)
from tests.modeling.tiny_model import labeled_inputs, tiny_config, tiny_model

# Folded frozen batch norm


def make_conv(activation=None, **arguments):
    """A convolution with a frozen batch norm that is not the identity."""
    generator = torch.Generator().manual_seed(1)
    norm = FrozenBatchNorm2d(6)
    for buffer in norm.buffers():
        buffer.copy_(torch.rand(6, generator=generator) + 0.5)
    norm.bias -= 1.0
    return Conv2d(4, 6, 3, norm=norm, activation=activation, bias=False, **arguments)


class Block(CNNBlockBase):
    def __init__(self, conv):
        super().__init__(conv.in_channels, conv.out_channels, 1)
        self.conv = conv

    def forward(self, x):
        return self.conv(x)


def output_and_gradients(model, x):
    x = x.clone().requires_grad_()
    out = model(x)
    (out.cos() * torch.arange(out.numel()).view_as(out)).sum().backward()
    return out, x.grad, *(p.grad for p in model.parameters())


@pytest.mark.parametrize(
    "arguments", [{}, {"stride": 2, "padding": 1}, {"groups": 2}, {"dilation": 2}], ids=str
)
@pytest.mark.parametrize("activation", [None, torch.relu], ids=["linear", "relu"])
def test_folded_convolution_has_the_same_output_gradients_and_names(activation, arguments):
    original = make_conv(activation, **arguments).double()
    folded = FoldedConv2d(copy.deepcopy(original))
    assert list(folded.state_dict()) == list(original.state_dict())
    x = torch.randn(2, 4, 9, 7, dtype=torch.float64)
    torch.testing.assert_close(
        output_and_gradients(folded, x), output_and_gradients(original, x), rtol=1e-10, atol=1e-10
    )


def test_folded_convolution_matches_a_hand_computed_value():
    """A 1x1 convolution by 3, then (y - 2) / sqrt(4) * 5 + 7."""
    conv = Conv2d(1, 1, 1, bias=False, norm=FrozenBatchNorm2d(1, eps=0.0))
    with torch.no_grad():
        conv.weight.fill_(3.0)
        for name, value in {
            "running_mean": 2.0,
            "running_var": 4.0,
            "weight": 5.0,
            "bias": 7.0,
        }.items():
            getattr(conv.norm, name).fill_(value)
    assert FoldedConv2d(conv)(torch.full((1, 1, 1, 1), 10.0)).item() == pytest.approx(77.0)


class Subclass(Conv2d):
    pass


@pytest.mark.parametrize(
    "conv",
    [
        *(Conv2d(4, 32, 3, norm=get_norm(norm, 32)) for norm in ("BN", "GN", "")),
        Conv2d(4, 6, 3, norm=FrozenBatchNorm2d(6)),
        Subclass(4, 6, 3, norm=FrozenBatchNorm2d(6), bias=False),
    ],
    ids=["BN", "GN", "no norm", "with bias", "subclass"],
)
def test_other_convolutions_are_not_folded(conv):
    block = Block(conv)
    fold_frozen_batchnorm(block)
    assert block.conv is conv


def test_model_with_folded_norms_has_the_same_names_and_features():
    settings = {"MODEL.RESNETS.NORM": "FrozenBN"}
    model = tiny_model(settings).eval()
    assert any(isinstance(module, FoldedConv2d) for module in model.modules())
    original = build_backbone(tiny_config(settings)).eval()
    assert list(original.state_dict()) == list(model.backbone.state_dict())
    original.load_state_dict(model.backbone.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.backbone(x), original(x), rtol=1e-4, atol=1e-4)


def test_folded_convolution_runs_in_half_precision_under_autocast():
    folded = FoldedConv2d(make_conv())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = folded(torch.randn(1, 4, 8, 8))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert folded.weight.grad.dtype == torch.float32


# ROIAlign


@pytest.fixture
def set_threads():
    """Sets the number of threads of PyTorch for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def random_rois(count, images=2, size=32.0):
    corner = torch.rand(count, 2) * size * 1.2 - 3  # some are partly or fully outside
    boxes = torch.cat([corner, corner + torch.rand(count, 2) * size], dim=1)
    return torch.cat([torch.randint(images, (count, 1)).float(), boxes], dim=1)


def output_and_gradient(align, features, rois):
    features = features.clone().requires_grad_()
    out = align(features, rois)
    (out * torch.arange(out.numel()).view_as(out).cos()).sum().backward()
    return out.detach(), features.grad


@pytest.mark.parametrize("arguments", [((7, 7), 0.5, 0), ((3, 5), 0.25, 2), ((1, 1), 1.0, 0)])
@pytest.mark.parametrize("channels", [1, 2, 5, 16])
@pytest.mark.parametrize("count", [0, 1, 40])
def test_parallel_roi_align_is_bitwise_equal_to_torchvision(
    set_threads, arguments, channels, count
):
    set_threads(3)
    torch.manual_seed(channels + count)
    features, rois = torch.randn(2, channels, 16, 20), random_rois(count)
    original = ROIAlign(*arguments)
    (parallel,) = parallelize_roi_align(torch.nn.ModuleList([original]))
    assert type(parallel) is ParallelROIAlign
    for expected, actual in zip(
        output_and_gradient(original, features, rois),
        output_and_gradient(parallel, features, rois),
        strict=True,
    ):
        assert torch.equal(actual, expected)


def test_parallel_roi_align_gradient_matches_finite_differences(set_threads):
    """The output is linear in the features, so the differences are exact up to rounding."""
    set_threads(2)
    torch.manual_seed(0)
    align = ParallelROIAlign((2, 2), 1.0, 2)
    features, rois = torch.randn(1, 2, 6, 6), torch.tensor([[0.0, 0.7, 1.1, 4.3, 5.2]])
    _, gradient = output_and_gradient(align, features, rois)
    weights = torch.arange(8).view(1, 2, 2, 2).cos()
    for place in ((0, 0, 2, 2), (0, 1, 4, 3), (0, 0, 0, 5)):
        step = torch.zeros_like(features)
        step[place] = 0.5
        both = [(align(features + sign * step, rois) * weights).sum() for sign in (1, -1)]
        assert gradient[place].item() == pytest.approx((both[0] - both[1]).item(), abs=1e-4)


@pytest.mark.parametrize("case", ["one thread", "double", "half", "tracing"])
def test_parallel_roi_align_falls_back_to_the_plain_operator(set_threads, monkeypatch, case):
    set_threads(1 if case == "one thread" else 2)
    monkeypatch.setattr(
        "locreweight.modeling.layers._map_channels", lambda *_: pytest.fail("parallel")
    )
    features, rois = torch.randn(2, 4, 8, 8), random_rois(3)
    align = ParallelROIAlign((2, 2), 1.0, 0)
    if case == "tracing":
        traced = torch.jit.trace(align, (features, rois), check_trace=False)
        assert "torchvision::roi_align" in str(traced.graph)
    else:
        dtype = {"double": torch.float64, "half": torch.float16}.get(case, torch.float32)
        assert align(features.to(dtype), rois).shape == (3, 4, 2, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_boxes_keep_full_precision_under_autocast(dtype):
    """Beyond 1024, float16 has a resolution of 1 pixel and bfloat16 of 8 pixels."""
    torch.manual_seed(0)
    features = torch.randn(1, 4, 8, 330).to(dtype).requires_grad_()
    rois = torch.tensor([[0.0, 1217.7, 5.3, 1229.4, 17.9]])
    original, parallel = ROIAlign((7, 7), 0.25, 0), ParallelROIAlign((7, 7), 0.25, 0)
    with torch.autocast("cpu", dtype=dtype):
        actual, rounded = parallel(features, rois), original(features, rois)
    expected = original(features.float(), rois)
    torch.testing.assert_close(actual.float(), expected, rtol=0.01, atol=0.01)
    assert (rounded.float() - expected).abs().max() > 0.1  # Detectron2 rounds the boxes
    actual.float().sum().backward()
    assert features.grad.isfinite().all() and features.grad.abs().sum() > 0


def test_parallel_roi_align_records_no_graph_without_gradient(set_threads):
    set_threads(2)
    features = torch.randn(2, 4, 8, 8, requires_grad=True)
    with torch.no_grad():
        assert not ParallelROIAlign((2, 2), 1.0, 0)(features, random_rois(3)).requires_grad


def test_detector_has_the_same_losses_with_any_number_of_threads(set_threads):
    losses = []
    model = tiny_model().train()
    layers = [type(m) for m in model.roi_heads.box_pooler.modules()]
    assert ParallelROIAlign in layers and ROIAlign not in layers
    for count in (1, 2):
        set_threads(count)
        torch.manual_seed(0)
        with torch.random.fork_rng(), EventStorage():
            output = model(labeled_inputs())
        losses.append(torch.stack(list(output.values())).detach())
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
