"""The step does not wait for the device where the mathematics does not ask for it.

On a GPU reading a number means waiting for all that was asked for before. It is counted on a device
that only pretends to be one: a step of burn-in, then one of mutual learning, with a log afterwards,
and two images in each of the streams.
"""

import pytest

from locreweight.engine import step_metrics as measurements
from locreweight.engine import writers as metrics

LOG = {"_to_host: tolist": 1}  # all that was measured in both steps
FOREGROUND = "foreground: nonzero"  # rows that are regressed: as many as are foreground
PSEUDO_LABELS = {
    # Of each unlabeled image, which predictions of the teacher are finite,
    "inference: index": 2,
    # which detections are pseudo-labels, and which of them are in sight.
    "select_pseudo_labels: nonzero": 2,
    "project_to_strong_view: nonzero": 2,
}


def of_this_package(waits):
    """Detectron2's own are its own affair."""
    found = (place.partition("locreweight: ") for place in waits)
    return {place: waits[package + place] for _, package, place in found if package}


@pytest.mark.parametrize("name", ["LocReweight", "ShuffledLocReweight", "SoftTeacher", "float16"])
def test_a_step_waits_for_what_it_has_to_know(on_a_device, name):
    """Of both streams in mutual learning; and for what was measured where the log is written."""
    found = on_a_device[name]
    assert of_this_package(found["burn_in"]) == {FOREGROUND: 1}
    assert of_this_package(found["mutual"]) == LOG | PSEUDO_LABELS | {FOREGROUND: 2}


def test_nobody_waits_for_boxes_that_are_not_regressed(on_a_device):
    mutual = of_this_package(on_a_device["UnbiasedTeacher"]["mutual"])
    assert mutual == LOG | PSEUDO_LABELS | {FOREGROUND: 1}


@pytest.mark.parametrize(("iterations", "period"), [(3, 3), (6, 3), (6, 2)])
def test_what_was_measured_is_read_once_a_logging_period(
    make_trainer, monkeypatch, iterations, period
):
    read = []
    to_host = measurements._to_host
    monkeypatch.setattr(measurements, "_to_host", lambda x: read.append(len(x)) or to_host(x))
    monkeypatch.setattr(metrics, "PERIOD", period)
    make_trainer({"SEMI.BURN_IN_ITERS": 0, "SOLVER.MAX_ITER": iterations}).train()
    assert len(read) == iterations / period and all(read)
