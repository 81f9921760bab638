"""Corner coding of boxes, and its compatibility with Detectron2's Box2BoxTransform."""

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from torch.testing import assert_close

from locreweight.modeling import CornerBoxTransform


def random_boxes(count):
    corner = torch.rand(count, 2) * 100
    return torch.cat([corner, corner + 5 + torch.rand(count, 2) * 50], dim=1)


def test_deltas_match_hand_computed_values():
    proposal = torch.tensor([[10.0, 20.0, 30.0, 60.0]])  # 20 wide, 40 high
    target = torch.tensor([[12.0, 16.0, 29.0, 62.0]])
    deltas = CornerBoxTransform((10.0, 5.0)).get_deltas(proposal, target)
    assert_close(deltas, torch.tensor([[1.0, -0.5, -0.5, 0.25]]))


@pytest.mark.parametrize("weights", [(10.0, 10.0), (10.0, 5.0), (1.0, 1.0)])
def test_apply_deltas_inverts_get_deltas(weights):
    coding = CornerBoxTransform(weights)
    proposals, targets = random_boxes(50), random_boxes(50)
    deltas = coding.get_deltas(proposals, targets)
    assert_close(coding.apply_deltas(deltas, proposals), targets, rtol=1e-5, atol=1e-4)


def test_zero_deltas_return_the_proposals():
    boxes = random_boxes(5)
    assert torch.equal(CornerBoxTransform().apply_deltas(torch.zeros(5, 8), boxes)[:, 4:], boxes)


def test_several_boxes_per_proposal_are_decoded_independently():
    coding, proposals = CornerBoxTransform((10.0, 5.0)), random_boxes(6)
    deltas = torch.randn(6, 3 * 4)
    together = coding.apply_deltas(deltas, proposals)
    apart = [coding.apply_deltas(deltas[:, 4 * k : 4 * k + 4], proposals) for k in range(3)]
    assert torch.equal(together, torch.cat(apart, dim=1))


@pytest.mark.parametrize(
    ("offsets", "expected"),
    [
        ([20.0, 0.0, 0.0, 0.0], [10.0, 0.0, 20.0, 10.0]),  # left edge moved past the right edge
        ([0.0, 0.0, -15.0, -20.0], [-5.0, -10.0, 0.0, 0.0]),
        ([10.0, 20.0, -10.0, -10.0], [0.0, 0.0, 10.0, 20.0]),
    ],
)
def test_crossed_corners_are_swapped(offsets, expected):
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    decoded = CornerBoxTransform().apply_deltas(torch.tensor([offsets]), boxes)
    assert_close(decoded, torch.tensor([expected]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_deltas_are_decoded_in_float32(dtype):
    coding, proposals = CornerBoxTransform(), random_boxes(20) + 1000
    deltas = torch.randn(20, 8).to(dtype)
    decoded = coding.apply_deltas(deltas, proposals)
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, coding.apply_deltas(deltas.float(), proposals))


def test_number_of_weights_is_that_of_detectron2():
    assert len(CornerBoxTransform().weights) == len(Box2BoxTransform((10, 10, 5, 5)).weights) == 4


def test_shapes_and_dtypes_equal_detectron2():
    corners, centers = CornerBoxTransform(), Box2BoxTransform((10.0, 10.0, 5.0, 5.0))
    proposals, targets, deltas = random_boxes(7), random_boxes(7), torch.randn(7, 12).half()
    for method, arguments in (
        ("get_deltas", (proposals, targets)),
        ("apply_deltas", (deltas, proposals)),
        ("get_deltas", (proposals[:0], targets[:0])),
        ("apply_deltas", (deltas[:0], proposals[:0])),
    ):
        a, b = (getattr(coding, method)(*arguments) for coding in (corners, centers))
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_translation_is_decoded_as_in_detectron2():
    """Both corners and the center move by the same offset."""
    proposals, shift = random_boxes(9), torch.randn(9, 2)
    corners = CornerBoxTransform().apply_deltas(shift.repeat(1, 2), proposals)
    centers = Box2BoxTransform((10.0, 10.0, 5.0, 5.0)).apply_deltas(
        torch.cat([shift, torch.zeros(9, 2)], dim=1), proposals
    )
    assert_close(corners, centers, rtol=1e-5, atol=1e-4)


def test_apply_deltas_has_a_gradient():
    deltas = torch.randn(4, 4, requires_grad=True)
    CornerBoxTransform().apply_deltas(deltas, random_boxes(4)).sum().backward()
    assert (deltas.grad != 0).all()
