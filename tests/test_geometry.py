"""Projection of boxes between augmented views (Sec. 3.4)."""

import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from locreweight.geometry import between_views, warp_boxes

HALVES = [torch.float16, torch.bfloat16]
HEIGHT, WIDTH = SIZE = (40, 60)
UNBOUNDED = (1e9, 1e9)
SEEDS = range(10)


def matrix(*rows):
    return torch.tensor([*rows, (0, 0, 1)], dtype=torch.float64)


def scale(x, y):
    return matrix((x, 0, 0), (0, y, 0))


def translate(x, y):
    return matrix((1, 0, x), (0, 1, y))


def rotate(degrees):
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return matrix((c, -s, 0), (s, c, 0))


def shear(x, y):
    return matrix((1, x, 0), (y, 1, 0))


FLIP_X = matrix((-1, 0, WIDTH), (0, 1, 0))
FLIP_Y = matrix((1, 0, 0), (0, -1, HEIGHT))
AXIS_ALIGNED = {
    "identity": (torch.eye(3, dtype=torch.float64), SIZE),
    "flip in x": (FLIP_X, SIZE),
    "flip in y": (FLIP_Y, SIZE),
    "scale": (scale(2, 0.5), (20, 120)),
    "translation": (translate(5, 7), (47, 65)),
    "combined": (translate(5, 7) @ scale(2, 0.5) @ FLIP_Y @ FLIP_X, (27, 125)),
}
each_axis_aligned = pytest.mark.parametrize(
    ("forward", "size"), AXIS_ALIGNED.values(), ids=AXIS_ALIGNED.keys()
)


def boxes_of(*rows):
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 4)


def random_boxes(count, size=SIZE):
    """Random boxes within an image of the given height and width."""
    x = torch.rand(count, 2, dtype=torch.float64).sort(dim=1).values * size[1]
    y = torch.rand(count, 2, dtype=torch.float64).sort(dim=1).values * size[0]
    return torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], dim=1)


def random_affine():
    """Random affine transform that maps a small image to positive coordinates."""
    angle, *numbers = torch.rand(5, dtype=torch.float64).tolist()
    x, y, shear_x, shear_y = numbers
    linear = rotate(360 * angle) @ shear(shear_x - 0.5, shear_y - 0.5) @ scale(0.5 + x, 0.5 + y)
    return translate(500, 500) @ linear


def map_points(points, affine):
    """Map ``(x, y)`` pairs by the first two rows of the matrix."""
    (a, b, c), (d, e, f), _ = affine.tolist()
    return [(a * x + b * y + c, d * x + e * y + f) for x, y in points]


# warp_boxes


@pytest.mark.parametrize(
    ("affine", "expected"),
    [
        (FLIP_X, (49, 2, 59, 22)),
        (FLIP_Y, (1, 18, 11, 38)),
        (scale(2, 0.5), (2, 1, 22, 11)),
        (translate(5, 7), (6, 9, 16, 29)),
        (translate(30, 0) @ rotate(90), (8, 1, 28, 11)),
        (translate(30, 30) @ rotate(180), (19, 8, 29, 28)),
        (shear(0.5, 0), (2, 2, 22, 22)),
        (shear(0, 0.5), (1, 2.5, 11, 27.5)),
    ],
)
def test_warped_box_matches_a_hand_computed_box(affine, expected):
    warped = warp_boxes(boxes_of((1, 2, 11, 22)), affine, UNBOUNDED)
    assert_close(warped, boxes_of(expected))


def test_hull_of_a_square_rotated_by_45_degrees_has_the_diagonal_as_side():
    rotation = translate(10, 10) @ rotate(45) @ translate(-10, -10)
    low, high = 10 - 2 * math.sqrt(2), 10 + 2 * math.sqrt(2)
    warped = warp_boxes(boxes_of((8, 8, 12, 12)), rotation, UNBOUNDED)
    assert_close(warped, boxes_of((low, low, high, high)))


@pytest.mark.parametrize("seed", SEEDS)
def test_warped_boxes_match_a_loop_over_corners(seed):
    torch.manual_seed(seed)
    boxes, affine = random_boxes(20), translate(-480, -480) @ random_affine()
    warped = warp_boxes(boxes, affine, SIZE)
    expected = []
    for x1, y1, x2, y2 in boxes.tolist():
        corners = map_points([(x1, y1), (x2, y1), (x1, y2), (x2, y2)], affine)
        xs = [min(max(x, 0), WIDTH) for x, _ in corners]
        ys = [min(max(y, 0), HEIGHT) for _, y in corners]
        expected.append((min(xs), min(ys), max(xs), max(ys)))
    assert_close(warped, boxes_of(*expected))


@each_axis_aligned
def test_inverse_of_an_axis_aligned_view_restores_the_box(forward, size):
    boxes = random_boxes(20)
    warped = warp_boxes(boxes, forward, size)
    assert_close(warp_boxes(warped, forward.inverse(), SIZE), boxes)


@pytest.mark.parametrize("seed", SEEDS)
def test_inverse_of_a_rotated_or_sheared_view_enlarges_the_box(seed):
    torch.manual_seed(seed)
    boxes, affine = random_boxes(20) + 500, random_affine()
    affine = affine @ translate(-500, -500)
    back = warp_boxes(warp_boxes(boxes, affine, UNBOUNDED), affine.inverse(), UNBOUNDED)
    assert (back[:, :2] < boxes[:, :2]).all()
    assert (back[:, 2:] > boxes[:, 2:]).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_warped_box_contains_every_mapped_point_of_the_box(seed):
    torch.manual_seed(seed)
    (box,), affine = random_boxes(1), random_affine()
    (hull,) = warp_boxes(box[None], affine, UNBOUNDED)
    inside = box[:2] + torch.rand(100, 2, dtype=torch.float64) * (box[2:] - box[:2])
    mapped = torch.tensor(map_points(inside.tolist(), affine))
    assert ((mapped > hull[:2]) & (mapped < hull[2:])).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_warped_box_is_ordered_and_within_the_view(seed):
    torch.manual_seed(seed)
    boxes = warp_boxes(random_boxes(50), translate(-480, -480) @ random_affine(), SIZE)
    assert (boxes[:, :2] <= boxes[:, 2:]).all()
    assert (boxes >= 0).all()
    assert (boxes <= torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])).all()


def test_image_size_is_height_then_width():
    warped = warp_boxes(boxes_of((-5, -5, 500, 500)), torch.eye(3), (10, 20))
    assert_close(warped, boxes_of((0, 0, 20, 10)))


@pytest.mark.parametrize(
    ("outside", "expected"),
    [
        ((-9, 2, -3, 5), (0, 2, 0, 5)),
        ((70, 2, 80, 5), (60, 2, 60, 5)),
        ((2, -9, 5, -3), (2, 0, 5, 0)),
        ((2, 70, 5, 80), (2, 40, 5, 40)),
        ((70, 70, 80, 80), (60, 40, 60, 40)),
        ((-1e9, -1e9, -1e8, -1e8), (0, 0, 0, 0)),
    ],
)
def test_box_outside_of_the_view_has_no_area_on_the_border(outside, expected):
    shift = translate(3, 4)
    start = boxes_of(outside) - boxes_of((3, 4, 3, 4))
    assert_close(warp_boxes(start, shift, SIZE), boxes_of(expected))


def test_boxes_are_warped_independently():
    boxes, affine, order = random_boxes(20), random_affine(), torch.randperm(20)
    warped = warp_boxes(boxes, affine, UNBOUNDED)
    assert_close(warp_boxes(boxes[order], affine, UNBOUNDED), warped[order])


def test_warping_no_boxes_gives_no_boxes():
    warped = warp_boxes(torch.zeros(0, 4), torch.eye(3), SIZE)
    assert_close(warped, torch.zeros(0, 4))


def test_warping_does_not_change_its_inputs():
    boxes, affine = random_boxes(5) + 30, random_affine()
    before = boxes.clone(), affine.clone()
    warp_boxes(boxes, affine, SIZE)
    assert_close((boxes, affine), before, rtol=0, atol=0)


def test_float64_matrix_warps_float32_boxes():
    boxes, affine = random_boxes(20), random_affine()
    warped = warp_boxes(boxes.float(), affine, UNBOUNDED)
    assert_close(warped, warp_boxes(boxes, affine, UNBOUNDED).float())


@pytest.mark.parametrize("dtype", [*HALVES, torch.int32, torch.int64])
def test_half_precision_and_integer_boxes_become_float32(dtype):
    boxes, affine = random_boxes(20).to(dtype), random_affine().float()
    expected = warp_boxes(boxes.float(), affine, UNBOUNDED)
    assert_close(warp_boxes(boxes, affine, UNBOUNDED), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", HALVES)
def test_warping_is_float32_under_autocast(dtype):
    boxes, affine = random_boxes(20).float(), random_affine().float()
    expected = warp_boxes(boxes, affine, UNBOUNDED)
    with torch.autocast("cpu", dtype=dtype):
        assert_close(warp_boxes(boxes, affine, UNBOUNDED), expected, rtol=0, atol=0)


@pytest.mark.parametrize("seed", SEEDS)
def test_warping_has_correct_gradients(seed):
    torch.manual_seed(seed)
    boxes, affine = random_boxes(3).requires_grad_(), random_affine().requires_grad_()
    assert gradcheck(lambda b, m: warp_boxes(b, m, UNBOUNDED), (boxes, affine))


# between_views


def test_between_views_matches_a_hand_computed_matrix():
    """The source view has half the size, the target view is shifted by (3, 4)."""
    expected = matrix((2, 0, 3), (0, 2, 4))
    assert_close(between_views(scale(0.5, 0.5), translate(3, 4)), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_between_views_maps_points_of_the_source_to_the_target(seed):
    torch.manual_seed(seed)
    source, target = random_affine(), random_affine()
    points = torch.rand(20, 2).tolist()
    through = map_points(map_points(points, source), between_views(source, target))
    assert_close(torch.tensor(through), torch.tensor(map_points(points, target)))


@pytest.mark.parametrize("seed", SEEDS)
def test_between_views_can_be_chained_and_inverted(seed):
    torch.manual_seed(seed)
    a, b, c = (random_affine() for _ in range(3))
    assert_close(between_views(b, c) @ between_views(a, b), between_views(a, c))
    assert_close(between_views(a, b).inverse(), between_views(b, a))
    assert_close(between_views(a, a), torch.eye(3, dtype=torch.float64))


@each_axis_aligned
def test_warping_between_views_equals_warping_from_the_original(forward, size):
    boxes = random_boxes(20)
    source, target = translate(1, 2) @ scale(3, 4), forward
    in_source = warp_boxes(boxes, source, UNBOUNDED)
    in_target = warp_boxes(in_source, between_views(source, target), size)
    assert_close(in_target, warp_boxes(boxes, target, size))


@pytest.mark.parametrize("dtype", HALVES)
def test_between_views_is_float32_under_autocast(dtype):
    source, target = random_affine().float(), random_affine().float()
    expected = between_views(source, target)
    with torch.autocast("cpu", dtype=dtype):
        assert_close(between_views(source, target), expected, rtol=0, atol=0)


def test_between_views_has_correct_gradients():
    views = [(scale(0.1, 0.1) @ random_affine()).requires_grad_() for _ in range(2)]
    assert gradcheck(between_views, views)


@pytest.mark.parametrize(
    "source", [scale(0, 1), scale(1, 0), scale(0, 0), matrix((1, 2, 3), (2, 4, 5))]
)
def test_view_without_area_is_rejected(source):
    with pytest.raises(ValueError, match="cannot be inverted"):
        between_views(source, scale(1, 1))
