"""Training where tensors do not lie in the host's memory, as on a GPU; see pretend_device.py."""

import json

import pytest

TRAININGS = [
    "LocReweight",
    "ShuffledLocReweight",
    "SoftTeacher",
    "UnbiasedTeacher",
    "Stac",
    "float16",
    "everything",
]


@pytest.mark.parametrize("name", TRAININGS)
def test_the_same_is_learned_as_on_the_cpu(on_a_device, name):
    """No tensor of the host's is met on the device, and none of the device's on the host."""
    found = on_a_device[name]
    assert found["moved"] > 1e-3
    assert found["difference"] < 1e-6


def test_all_methods_are_tried(on_a_device):
    assert set(on_a_device) == set(TRAININGS)


def test_evaluation_and_the_loss_scale_come_back_to_the_host(on_a_device):
    assert "bbox/AP" in on_a_device["everything"]["last_metrics"]
    assert on_a_device["float16"]["last_metrics"]["loss_scale"] > 1


# The tests' own oracle: what a GPU refuses, what it does at once, what a host waits for.
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


def test_the_device_would_notice(pretended):
    assert json.loads((pretended / "answers.json").read_text()) == ANSWERS
