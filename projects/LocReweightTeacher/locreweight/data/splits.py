"""Which images of a fully annotated set are used with their labels."""

from __future__ import annotations

import numpy as np


def split_indices(size: int, labeled_percent: float, seed: int) -> tuple[list[int], list[int]]:
    """Draw the labeled images of a data set, without replacement.

    The draw depends on the arguments alone: it is the same in every process, on every machine and
    in every run. It is nested: a smaller percentage takes a subset of what a larger one takes.

    Args:
        size: number of images.
        labeled_percent: in (0, 100]; at least one image is drawn.
        seed: which of the possible draws.

    Returns:
        indices of the labeled images and of the others, both in order.

    Raises:
        ValueError: for a percentage outside of (0, 100].
    """
    if not 0 < labeled_percent <= 100:
        raise ValueError(f"labeled_percent must lie in (0, 100], got {labeled_percent}")
    count = max(1, round(size * labeled_percent / 100))
    # numpy's old generator: its numbers are promised to stay the same in all later versions.
    order = np.random.RandomState(seed).permutation(size)
    return sorted(order[:count].tolist()), sorted(order[count:].tolist())
