"""Drawn splits: reproducible, nested and of the requested size."""

import os
import subprocess
import sys
from itertools import pairwise

import pytest

from locreweight.data.datasets.splits import split_indices


@pytest.mark.parametrize("hash_seed", ["0", "12345"])
def test_same_draw_in_every_process(hash_seed):
    script = (
        "import numpy, random; numpy.random.seed(9); random.seed(9)\n"
        "from locreweight.data.datasets.splits import split_indices\n"
        "print(split_indices(50, 20.0, 3))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    printed = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == str(split_indices(50, 20.0, 3))


def test_same_draw_as_earlier_versions():
    # Written down once: a change would make runs of before and after incomparable.
    assert split_indices(20, 25.0, 1)[0] == [2, 3, 6, 10, 16]


@pytest.mark.parametrize("seed", [1, 2])
def test_nested(seed):
    draws = [set(split_indices(1000, percent, seed)[0]) for percent in (0.1, 1, 5, 10, 50, 100)]
    assert all(fewer < more for fewer, more in pairwise(draws))


@pytest.mark.parametrize("percent", [0.5, 10.0, 33.3, 99.9, 100.0])
def test_each_image_is_in_one_part(percent):
    labeled, others = split_indices(117, percent, 1)
    assert sorted(labeled + others) == list(range(117))
    assert labeled == sorted(labeled)
    assert others == sorted(others)


@pytest.mark.parametrize(
    ("size", "percent", "count"),
    [
        (117266, 1.0, 1173),
        (117266, 10.0, 11727),
        (200, 1.2, 2),
        (200, 1.3, 3),
        (10, 100.0, 10),
        (10, 99.0, 10),
        (10, 94.0, 9),
        (10, 0.01, 1),
        (1, 50.0, 1),
    ],
)
def test_size_is_rounded_and_at_least_one(size, percent, count):
    assert len(split_indices(size, percent, 1)[0]) == count


def test_seeds_differ():
    assert len({tuple(split_indices(100, 10.0, seed)[0]) for seed in range(5)}) == 5


@pytest.mark.parametrize("percent", [0.0, -1.0, 100.1, float("nan"), float("inf")])
def test_percentage_out_of_range(percent):
    with pytest.raises(ValueError, match=r"\(0, 100\]"):
        split_indices(10, percent, 1)
