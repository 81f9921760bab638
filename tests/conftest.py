"""Fixed seeds and thread counts for all tests."""

from __future__ import annotations

import os
import random

# Read when torch is imported. Tensors of tests are tiny: more threads, here or in a process that a
# test starts, only wait for each other, and for whatever else runs on the machine.
os.environ["OMP_NUM_THREADS"] = "1"
# Tests compare to the bit, which a GPU's kernels do not promise; see engine/pretend_device.py. For
# the tests in engine/test_gpu.py, `make test-gpu` sets this variable.
if os.environ.get("TEST_ON_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
