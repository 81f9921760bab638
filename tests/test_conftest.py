"""What conftest.py sets for every test."""

import random

import numpy as np
import pytest
import torch

drawn = set()


@pytest.mark.parametrize("repetition", range(2))
def test_seeds_are_fixed(repetition):
    drawn.add((random.random(), np.random.rand(), torch.rand(()).item()))
    assert len(drawn) == 1
