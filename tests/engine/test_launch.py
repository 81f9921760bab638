"""Start of processes."""

import sys

import pytest
import torch
from torch import distributed

from locreweight.engine import argument_parser, launch
from tests.engine.tiny_training import restored_loggers_and_signals


def test_launch_rejects_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SystemExit, match="error: 3 processes.*there are 2: use --num-gpus 2"):
        launch(print, argument_parser().parse_args(["--num-gpus", "3"]))


def test_launch_rejects_more_processes_of_torchrun_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(distributed, "is_torchelastic_launched", lambda: True)
    # The function `launch` of the package hides the module.
    module = sys.modules["locreweight.engine.launch"]
    monkeypatch.setattr(module, "_prctl_pr_set_pdeathsig", lambda _: None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    expected = pytest.raises(SystemExit, match="error: 2 processes.*there are 1")
    with restored_loggers_and_signals(), expected:
        launch(print, argument_parser().parse_args([]))
