"""Training on a device whose tensors do not mix with the CPU's; see pretend_device.py."""

import json

import pytest

from locreweight.methods import METHOD_REGISTRY
from tests.engine.tiny_training import METHODS

TRAININGS = [*METHODS, "float16", "everything"]


@pytest.mark.parametrize("name", TRAININGS)
def test_training_on_a_device_gives_the_weights_of_the_cpu(device_results, name):
    """No operation mixes tensors of the device and the CPU."""
    result = device_results[name]
    assert result["moved"] > 1e-3
    assert result["difference"] < 1e-6


def test_all_methods_are_trained_on_the_device(device_results):
    assert set(device_results) == set(TRAININGS)
    # Other tests register methods of their own.
    methods = {name for name, x in METHOD_REGISTRY if x.__module__.startswith("locreweight.")}
    assert methods <= set(TRAININGS)


def test_results_and_loss_scale_are_logged_from_the_device(device_results):
    assert "bbox/AP" in device_results["everything"]["last_metrics"]
    assert device_results["float16"]["last_metrics"]["loss_scale"] > 1


# What the pretend device must do, as a GPU does: refuse, continue at once, or wait.
ANSWERS = {
    "with the host's": "aten.add.Tensor: one tensor is on pretend:0, one is on the cpu",
    "stacked with the host's": "aten.stack.default: one tensor is on pretend:0, one is on the cpu",
    "index into the host's": "aten.index.Tensor: one tensor is on pretend:0, one is on the cpu",
    "numpy": "numpy does not read tensors on pretend:0",
    "sum": "nothing",
    "with a number of the host's": "nothing",
    "index": "nothing",
    "copied in passing": "nothing",
    "item": "elsewhere: _local_scalar_dense",
    "tolist": "elsewhere: tolist",
    "nonzero": "elsewhere: nonzero",
    "mask": "elsewhere: index",
    "index of the host's": "elsewhere: to the device",
    "new tensor": "elsewhere: to the device",
    "to the device": "elsewhere: to the device",
    "to the host": "elsewhere: to the host",
    "copied into the host's": "elsewhere: to the host",
}


def test_pretend_device_refuses_and_waits_as_a_gpu(pretend_folder):
    assert json.loads((pretend_folder / "answers.json").read_text()) == ANSWERS
