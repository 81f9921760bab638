"""Placement of labels: inside the picture, at their box, and never above each other."""

import numpy as np
import pytest

from locreweight.visualization.labels import place_labels

PICTURE = (200, 150)


def rectangles(corners, sizes):
    return [
        (x, y, x + width, y + height)
        for (x, y), (width, height) in zip(corners, sizes, strict=True)
    ]


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ([50, 60, 90, 100], (50, 46)),  # above
        ([50, 0, 90, 40], (50, 40)),  # below, at the upper edge of the picture
        ([0, 0, 200, 150], (0, 0)),  # inside, if the box fills the picture
        ([180, 60, 198, 100], (160, 46)),  # moved along the right edge
    ],
)
def test_label_of_a_single_box(box, expected):
    assert place_labels(np.array([box]), [(40, 14)], PICTURE) == [expected]


def test_crowded_labels_stay_in_the_picture_and_do_not_overlap():
    random = np.random.default_rng(0)
    corners = random.integers(0, (180, 130), (60, 2))
    boxes = np.concatenate([corners, corners + random.integers(5, 20, (60, 2))], axis=1)
    sizes = [(int(width), 12) for width in random.integers(10, 40, 60)]
    placed = place_labels(boxes, sizes, PICTURE)
    shown = [i for i, corner in enumerate(placed) if corner is not None]
    assert 20 < len(shown) < 60
    labels = rectangles([placed[i] for i in shown], [sizes[i] for i in shown])
    for i, (x1, y1, x2, y2) in enumerate(labels):
        assert 0 <= x1 and 0 <= y1 and x2 <= PICTURE[0] and y2 <= PICTURE[1]
        left, top, right, bottom = boxes[shown[i]]
        assert x1 <= right and x2 >= left and y1 <= bottom and y2 >= top  # touches its box
        assert all(x2 <= a or c <= x1 or y2 <= b or d <= y1 for a, b, c, d in labels[:i])


def test_first_labels_are_preferred():
    same_box = np.array([[0, 0, 20, 20]] * 3)
    placed = place_labels(same_box, [(20, 15)] * 3, (20, 30))
    assert placed[0] is not None and placed[2] is None


def test_label_larger_than_the_picture_is_left_out():
    assert place_labels(np.array([[0, 0, 10, 10]]), [(300, 14)], PICTURE) == [None]


def test_label_avoids_other_boxes():
    boxes = np.array([[50, 60, 90, 100], [40, 40, 150, 60]])  # the second one is above the first
    (x, y), _ = place_labels(boxes, [(30, 14), (30, 14)], PICTURE)
    assert (x, y) == (50, 100)
