"""Corner coding of boxes, a drop-in for Detectron2's center coding."""

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from torch.testing import assert_close

from locreweight.modeling import CornerBoxTransform


def random_boxes(count):
    corner = torch.rand(count, 2) * 100
    return torch.cat([corner, corner + 5 + torch.rand(count, 2) * 50], dim=1)


def test_offsets_have_their_analytic_values():
    proposal = torch.tensor([[10.0, 20.0, 30.0, 60.0]])  # 20 wide, 40 high
    target = torch.tensor([[12.0, 16.0, 29.0, 62.0]])
    deltas = CornerBoxTransform((10.0, 5.0)).get_deltas(proposal, target)
    assert_close(deltas, torch.tensor([[1.0, -0.5, -0.5, 0.25]]))


@pytest.mark.parametrize("weights", [(10.0, 10.0), (10.0, 5.0), (1.0, 1.0)])
def test_applying_the_offsets_gives_the_targets_back(weights):
    coding = CornerBoxTransform(weights)
    proposals, targets = random_boxes(50), random_boxes(50)
    deltas = coding.get_deltas(proposals, targets)
    assert_close(coding.apply_deltas(deltas, proposals), targets, rtol=1e-5, atol=1e-4)


def test_zero_offsets_leave_the_proposals():
    boxes = random_boxes(5)
    assert torch.equal(CornerBoxTransform().apply_deltas(torch.zeros(5, 8), boxes)[:, 4:], boxes)


def test_several_boxes_of_a_proposal_are_each_decoded_from_it():
    coding, proposals = CornerBoxTransform((10.0, 5.0)), random_boxes(6)
    deltas = torch.randn(6, 3 * 4)
    together = coding.apply_deltas(deltas, proposals)
    apart = [coding.apply_deltas(deltas[:, 4 * k : 4 * k + 4], proposals) for k in range(3)]
    assert torch.equal(together, torch.cat(apart, dim=1))


@pytest.mark.parametrize(
    ("offsets", "expected"),
    [
        ([20.0, 0.0, 0.0, 0.0], [10.0, 0.0, 20.0, 10.0]),  # left edge beyond the right one
        ([0.0, 0.0, -15.0, -20.0], [-5.0, -10.0, 0.0, 0.0]),
        ([10.0, 20.0, -10.0, -10.0], [0.0, 0.0, 10.0, 20.0]),
    ],
)
def test_corners_that_cross_are_put_in_order(offsets, expected):
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    decoded = CornerBoxTransform().apply_deltas(torch.tensor([offsets]), boxes)
    assert_close(decoded, torch.tensor([expected]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_offsets_in_half_precision_are_decoded_in_float32(dtype):
    coding, proposals = CornerBoxTransform(), random_boxes(20) + 1000
    deltas = torch.randn(20, 8).to(dtype)
    decoded = coding.apply_deltas(deltas, proposals)
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, coding.apply_deltas(deltas.float(), proposals))


def test_its_weights_count_the_coordinates_as_those_of_detectron2_do():
    assert len(CornerBoxTransform().weights) == len(Box2BoxTransform((10, 10, 5, 5)).weights) == 4


def test_shapes_and_types_are_those_of_detectron2s_coding():
    ours, theirs = CornerBoxTransform(), Box2BoxTransform((10.0, 10.0, 5.0, 5.0))
    proposals, targets, deltas = random_boxes(7), random_boxes(7), torch.randn(7, 12).half()
    for method, arguments in (
        ("get_deltas", (proposals, targets)),
        ("apply_deltas", (deltas, proposals)),
        ("get_deltas", (proposals[:0], targets[:0])),
        ("apply_deltas", (deltas[:0], proposals[:0])),
    ):
        mine, reference = (getattr(coding, method)(*arguments) for coding in (ours, theirs))
        assert (mine.shape, mine.dtype) == (reference.shape, reference.dtype)


def test_a_shift_is_decoded_as_by_detectron2():
    """Both corners move by what the center moves by."""
    proposals, shift = random_boxes(9), torch.randn(9, 2)
    ours = CornerBoxTransform().apply_deltas(shift.repeat(1, 2), proposals)
    theirs = Box2BoxTransform((10.0, 10.0, 5.0, 5.0)).apply_deltas(
        torch.cat([shift, torch.zeros(9, 2)], dim=1), proposals
    )
    assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def test_gradient_reaches_the_offsets():
    deltas = torch.randn(4, 4, requires_grad=True)
    CornerBoxTransform().apply_deltas(deltas, random_boxes(4)).sum().backward()
    assert (deltas.grad != 0).all()
