"""ROIAlign on several threads: to the bit what it is on one."""

import pytest
import torch
from detectron2.layers import ROIAlign
from detectron2.utils.events import EventStorage

from locreweight.modeling.roi_align import ParallelROIAlign, parallelize_roi_align
from tests.modeling.tiny_model import labeled_inputs, tiny_model


@pytest.fixture
def threads():
    """Sets torch's number of them for a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def some_rois(count, images=2, size=32.0):
    corner = torch.rand(count, 2) * size * 1.2 - 3  # some lie partly or wholly outside
    boxes = torch.cat([corner, corner + torch.rand(count, 2) * size], dim=1)
    return torch.cat([torch.randint(images, (count, 1)).float(), boxes], dim=1)


def result_and_gradient(align, features, rois):
    features = features.clone().requires_grad_()
    out = align(features, rois)
    (out * torch.arange(out.numel()).view_as(out).cos()).sum().backward()
    return out.detach(), features.grad


@pytest.mark.parametrize("arguments", [((7, 7), 0.5, 0), ((3, 5), 0.25, 2), ((1, 1), 1.0, 0)])
@pytest.mark.parametrize("channels", [1, 2, 5, 16])
@pytest.mark.parametrize("count", [0, 1, 40])
def test_result_and_gradient_are_torchvisions(threads, arguments, channels, count):
    threads(3)
    torch.manual_seed(channels + count)
    features, rois = torch.randn(2, channels, 16, 20), some_rois(count)
    plain, parallel = ROIAlign(*arguments), ROIAlign(*arguments)
    parallelize_roi_align(parallel)
    assert type(parallel) is ParallelROIAlign
    for expected, found in zip(
        result_and_gradient(plain, features, rois),
        result_and_gradient(parallel, features, rois),
        strict=True,
    ):
        assert torch.equal(found, expected)


def test_the_gradient_is_that_of_finite_differences(threads):
    """Of a function that is linear in the features."""
    threads(2)
    torch.manual_seed(0)
    align = ParallelROIAlign((2, 2), 1.0, 2)
    features, rois = torch.randn(1, 2, 6, 6), torch.tensor([[0.0, 0.7, 1.1, 4.3, 5.2]])
    _, gradient = result_and_gradient(align, features, rois)
    weights = torch.arange(8).view(1, 2, 2, 2).cos()
    for place in ((0, 0, 2, 2), (0, 1, 4, 3), (0, 0, 0, 5)):
        step = torch.zeros_like(features)
        step[place] = 0.5
        both = [(align(features + sign * step, rois) * weights).sum() for sign in (1, -1)]
        assert gradient[place].item() == pytest.approx((both[0] - both[1]).item(), abs=1e-4)


@pytest.mark.parametrize("kind", ["one thread", "double", "half", "tracing"])
def test_otherwise_it_is_the_plain_operation(threads, monkeypatch, kind):
    threads(1 if kind == "one thread" else 2)
    monkeypatch.setattr(
        "locreweight.modeling.roi_align._in_parallel", lambda *_: pytest.fail("parallel")
    )
    features, rois = torch.randn(2, 4, 8, 8), some_rois(3)
    align = ParallelROIAlign((2, 2), 1.0, 0)
    if kind == "tracing":
        traced = torch.jit.trace(align, (features, rois), check_trace=False)
        assert "torchvision::roi_align" in str(traced.graph)
    else:
        dtype = {"double": torch.float64, "half": torch.float16}.get(kind, torch.float32)
        assert align(features.to(dtype), rois).shape == (3, 4, 2, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision_does_not_move_boxes(dtype):
    """Beyond 1024 pixels float16 knows whole ones, and bfloat16 every eighth."""
    torch.manual_seed(0)
    features = torch.randn(1, 4, 8, 330).to(dtype).requires_grad_()
    rois = torch.tensor([[0.0, 1217.7, 5.3, 1229.4, 17.9]])
    plain, parallel = ROIAlign((7, 7), 0.25, 0), ROIAlign((7, 7), 0.25, 0)
    parallelize_roi_align(parallel)
    with torch.autocast("cpu", dtype=dtype):
        found, rounded = parallel(features, rois), plain(features, rois)
    expected = plain(features.float(), rois)
    torch.testing.assert_close(found.float(), expected, rtol=0.01, atol=0.01)
    assert (rounded.float() - expected).abs().max() > 0.1  # why it is not left to Detectron2
    found.float().sum().backward()
    assert features.grad.isfinite().all() and features.grad.abs().sum() > 0


def test_nothing_is_recorded_where_no_gradient_is_asked_for(threads):
    threads(2)
    features = torch.randn(2, 4, 8, 8, requires_grad=True)
    with torch.no_grad():
        assert not ParallelROIAlign((2, 2), 1.0, 0)(features, some_rois(3)).requires_grad


def test_a_detector_trains_alike_with_any_number_of_threads(threads):
    losses = []
    model = tiny_model().train()
    kinds = [type(m) for m in model.roi_heads.box_pooler.modules()]
    assert ParallelROIAlign in kinds and ROIAlign not in kinds
    for count in (1, 2):
        threads(count)
        torch.manual_seed(0)
        with torch.random.fork_rng(), EventStorage():
            found = model(labeled_inputs())
        losses.append(torch.stack(list(found.values())).detach())
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
