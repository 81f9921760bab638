"""ParallelROIAlign: the same results and gradients as torchvision, on any number of threads."""

import pytest
import torch
from detectron2.layers import ROIAlign
from detectron2.utils.events import EventStorage

from locreweight.modeling.roi_align import ParallelROIAlign, parallelize_roi_align
from tests.modeling.tiny_model import labeled_inputs, tiny_model


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
        "locreweight.modeling.roi_align._map_channels", lambda *_: pytest.fail("parallel")
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
