"""Place the labels of boxes so that they neither leave the picture nor cover each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_INSIDE_COST = 0.4  # of covering the box itself, where covering another box costs 1


def place_labels(
    boxes: np.ndarray, sizes: Sequence[tuple[int, int]], picture: tuple[int, int]
) -> list[tuple[int, int] | None]:
    """Place a label at each box: above, below, beside or inside, where it covers the least.

    Args:
        boxes: ``(N, 4)`` xyxy, pixels; those whose labels are placed first come first.
        sizes: width and height of each label.
        picture: width and height.

    Returns:
        upper left corner of each label; None where there is no room left.
    """
    placed = np.zeros((0, 4))
    corners: list[tuple[int, int] | None] = []
    for i, (box, size) in enumerate(zip(boxes, sizes, strict=True)):
        candidates = _candidates(box, size, picture)
        free = ~(_overlaps(candidates, placed) > 0).any(axis=1)
        candidates = candidates[free]
        if not len(candidates):
            corners.append(None)
            continue
        covered = _overlaps(candidates, boxes)
        covered[:, i] *= _INSIDE_COST
        best = candidates[covered.sum(axis=1).argmin()]
        placed = np.concatenate([placed, best[None]])
        corners.append((int(best[0]), int(best[1])))
    return corners


def _candidates(box: np.ndarray, size: tuple[int, int], picture: tuple[int, int]) -> np.ndarray:
    """Rectangles ``(M, 4)`` xyxy inside the picture, most preferred first."""
    (x1, y1, x2, y2), (width, height) = box, size
    outside = [(x, y) for y in (y1 - height, y2) for x in (x1, x2 - width)]
    inside = [(x, y) for y in (y1, y2 - height) for x in (x1, x2 - width)]
    beside = [(x, y) for x in (x2, x1 - width) for y in (y1, y2 - height)]
    corners = np.array([*outside, *inside, *beside])
    # A box at the edge of the picture has a label that is moved along the edge.
    room = np.array(picture) - size
    moved = np.clip(corners, 0, np.maximum(room, 0))
    touches = (moved[:, 0] <= x2) & (moved[:, 0] + width >= x1)
    touches &= (moved[:, 1] <= y2) & (moved[:, 1] + height >= y1)
    corners = moved[touches & (room >= 0).all()]
    return np.concatenate([corners, corners + size], axis=1)


def _overlaps(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Share of each rectangle of the first ``(M, 4)`` that each of the second ``(N, 4)`` covers."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    area = (first[:, 2:] - first[:, :2]).prod(axis=1)
    return (high - low).clip(min=0).prod(axis=2) / area[:, None]
