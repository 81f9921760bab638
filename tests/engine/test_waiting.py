"""The training step makes the host wait for the device only where a number is needed.

On a GPU, reading a number waits for all work queued before. The waits are counted on a device that
is emulated on the CPU: in one step of burn-in and one of mutual learning, each with two images per
stream, followed by a log.
"""

import pytest

from locreweight.engine import step_metrics, writers

LOG = {"_to_host: tolist": 1}  # the metrics of both steps
FOREGROUND = "select_foreground: nonzero"  # the number of foreground proposals
PSEUDO_LABELS = {
    # For each unlabeled image: which predictions of the teacher are finite,
    "inference: index": 2,
    # which detections are pseudo-labels, and which of these are inside the strong view.
    "to_pseudo_labels: nonzero": 2,
    "project_to_strong_view: nonzero": 2,
}


def waits_in_this_package(waits):
    """Drop the waits in Detectron2's code."""
    parts = (place.partition("locreweight: ") for place in waits)
    return {place: waits[package + place] for _, package, place in parts if package}


@pytest.mark.parametrize(
    "name", ["LocReweight", "ShuffledLocReweight", "MeanLocReweight", "SoftTeacher", "float16"]
)
def test_step_waits_only_for_numbers_it_needs(device_results, name):
    results = device_results[name]
    assert waits_in_this_package(results["burn_in"]) == {FOREGROUND: 1}
    mutual = waits_in_this_package(results["mutual"])
    assert mutual == LOG | PSEUDO_LABELS | {FOREGROUND: 2}


def test_step_without_box_loss_on_pseudo_labels_does_not_wait_for_their_foreground(device_results):
    mutual = waits_in_this_package(device_results["UnbiasedTeacher"]["mutual"])
    assert mutual == LOG | PSEUDO_LABELS | {FOREGROUND: 1}


@pytest.mark.parametrize("name", ["MixPL", "LocReweightMix"])
def test_mixing_and_its_losses_do_not_wait(device_results, name):
    mutual = waits_in_this_package(device_results[name]["mutual"])
    functions = {place.partition(":")[0] for place in mutual}
    assert "to_pseudo_labels" in functions
    mixing = {"compose", "_fit", "flip_and_fit", "average", "mosaic", "place", "place_labels"}
    assert not functions & (mixing | {"classification_loss", "box_loss", "matched_certainty"})


@pytest.mark.parametrize(("iterations", "period"), [(3, 3), (6, 3), (6, 2)])
def test_metrics_are_read_once_per_logging_period(make_trainer, monkeypatch, iterations, period):
    read = []
    to_host = step_metrics._to_host
    monkeypatch.setattr(step_metrics, "_to_host", lambda x: read.append(len(x)) or to_host(x))
    monkeypatch.setattr(writers, "PERIOD", period)
    make_trainer({"SEMI.BURN_IN_ITERS": 0, "SOLVER.MAX_ITER": iterations}).train()
    assert len(read) == iterations / period and all(read)
