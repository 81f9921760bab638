"""Processes and devices that do not go together are told so before anything is begun."""

import sys

import pytest
import torch
from torch import distributed

from locreweight.engine import argument_parser, check_device, launch
from locreweight.errors import UsageError
from tests.engine.tiny_training import restored_loggers_and_signals


@pytest.fixture
def machine(monkeypatch):
    """Pretends to be one with GPUs, and a run of several processes."""

    def pretend(gpus, processes=1):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: processes)
        monkeypatch.setattr(distributed, "get_backend", lambda: "nccl" if gpus else "gloo")

    return pretend


@pytest.mark.parametrize(
    ("device", "gpus", "processes", "said"),
    [
        ("cuda", 0, 1, "no GPU here: add MODEL.DEVICE cpu"),
        ("cuda:1", 0, 1, "no GPU here"),
        ("cuda:0", 2, 2, "MODEL.DEVICE cuda:0 would put all processes on one GPU"),
        ("cpu", 2, 2, "MODEL.DEVICE is cpu.*CUDA_VISIBLE_DEVICES=''"),
    ],
)
def test_devices_that_cannot_be(machine, device, gpus, processes, said):
    machine(gpus, processes)
    with pytest.raises(UsageError, match=said):
        check_device(device)


@pytest.mark.parametrize(
    ("device", "gpus", "processes"),
    [("cuda", 1, 1), ("cuda:1", 2, 1), ("cuda", 2, 2), ("cpu", 2, 1), ("cpu", 0, 2)],
)
def test_devices_that_can_be(machine, device, gpus, processes):
    machine(gpus, processes)
    check_device(device)


def test_more_processes_than_gpus_are_an_error_of_one_line(machine):
    machine(gpus=2)
    with pytest.raises(SystemExit, match="error: 3 processes.*there are 2: use --num-gpus 2"):
        launch(print, argument_parser().parse_args(["--num-gpus", "3"]))


def test_torchruns_processes_are_counted_too(machine, monkeypatch):
    machine(gpus=1)
    monkeypatch.setattr(distributed, "is_torchelastic_launched", lambda: True)
    # The package's function of this name hides the module.
    module = sys.modules["locreweight.engine.launch"]
    monkeypatch.setattr(module, "_prctl_pr_set_pdeathsig", lambda _: None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    told = pytest.raises(SystemExit, match="error: 2 processes.*there are 1")
    with restored_loggers_and_signals(), told:
        launch(print, argument_parser().parse_args([]))
