"""The benchmarks run, and compute their numbers correctly. Speed is not tested."""

import math
from dataclasses import asdict, replace

import pytest
import torch

from benchmarks import growth, loader, methods, step
from benchmarks.memory import Cost
from benchmarks.timing import Clock, format_range, median_ratio, time_alternately
from benchmarks.workload import (
    Detectron2Baseline,
    Detectron2Training,
    TrainerStep,
    UnbiasedTeacherBaseline,
    Workload,
    make_batch,
)
from tests.modeling.tiny_model import TINY, as_options

SMALL = Workload(short_side=96, objects=3, classes=4, proposals=32)
OPTIONS = as_options(
    {key: value for key, value in TINY.items() if key.startswith(("MODEL.RESNETS", "MODEL.FPN"))}
    | {"MODEL.DEVICE": "cpu", "SOLVER.AMP.ENABLED": False}
)


def test_time_alternately_rotates_the_order():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = time_alternately(functions, repeats=3, warm_up=1)
    assert "".join(calls) == "abc" + "bca" + "cab" + "abc"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_median_ratio_compares_times_of_the_same_repetition():
    seconds = {"a": [1.0, 20.0, 3.0], "b": [2.0, 10.0, 3.0]}
    assert median_ratio(seconds, "a", "b") == 1.0
    assert format_range([3.0, 1.0, 2.0], 1000, 0) == "2000 (1000 to 3000)"


def test_clock_times_calls_and_keeps_their_results():
    class Owner:
        def twice(self, x):
            return 2 * x

    owner, clock = Owner(), Clock()
    clock.time_calls(owner, "twice", "doubling")
    assert [owner.twice(1), owner.twice(2)] == [2, 4]
    assert clock.seconds["doubling"] > 0


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
def test_growth_exponents_use_the_last_two_points(exponent):
    points = [(x, Cost(x**exponent, 0.0, 0.0), Cost(x, 0.0, 0.0)) for x in (1.0, 2.0, 8.0)]
    step_exponent, baseline_exponent = growth.growth_exponents(points)
    assert float(step_exponent) == pytest.approx(exponent)
    assert float(baseline_exponent) == pytest.approx(1.0)


@pytest.mark.parametrize("name", growth.SERIES)
def test_growth_series_changes_one_quantity(name):
    base, changed = asdict(growth.SMALL), set()
    for _, workload in growth.SERIES[name]:
        changed |= {key for key, value in asdict(workload).items() if value != base[key]}
    assert changed in (
        {"labeled", "unlabeled"},
        {"short_side"},
        {"proposals"},
        {"classes"},
        {"objects"},
    )


def test_make_batch_is_deterministic():
    first, second = make_batch(SMALL), make_batch(SMALL)
    for a, b in zip(first.unlabeled, second.unlabeled, strict=True):
        assert torch.equal(a.weak.image, b.weak.image)
        assert a.weak.image.shape == (3, 96, 128)
    for sample in first.labeled:
        boxes = sample["instances"].gt_boxes
        assert len(boxes) == SMALL.objects and boxes.nonempty().all()
        assert (boxes.tensor >= 0).all()


@pytest.mark.parametrize(
    "baseline_class", [Detectron2Baseline, Detectron2Training, UnbiasedTeacherBaseline]
)
def test_baseline_has_finite_gradients_and_small_activations(baseline_class):
    baseline = baseline_class(SMALL, OPTIONS)
    baseline()
    gradients = [p.grad for p in baseline.student.parameters() if p.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)
    features = baseline.student.backbone(torch.randn(1, 3, 96, 128))
    assert all(feature.abs().max() < 100 for feature in features.values())


def test_trainer_step_trains_on_the_fixed_pseudo_labels():
    baseline = Detectron2Baseline(SMALL, OPTIONS)
    weights = baseline.student.state_dict()
    trainer_step = TrainerStep(SMALL, weights, OPTIONS)
    trainer = trainer_step.trainer
    for name, value in trainer.student.state_dict().items():
        assert "log_variance" in name or torch.equal(value, weights[name]), name
    trainer.iter = 18
    trainer_step()
    trainer_step()  # metrics are read in the 20th iteration
    storage = trainer.storage
    assert storage.latest()["pseudo_labels/per_image"][0] == SMALL.objects
    assert math.isfinite(storage.latest()["total_loss"][0])
    assert storage.latest()["skipped_steps"][0] == 0
    assert trainer.iter == 20


@pytest.mark.parametrize(
    ("method", "labeled_views"),
    [("mum", 2), ("mixpl", 1), ("instant_teaching_star", 1), ("cst", 2)],
)
def test_methods_train_on_the_fixed_detections(method, labeled_views):
    assert method in methods.method_names()
    size = replace(SMALL, labeled=1, unlabeled=4)
    weights = Detectron2Baseline(size, OPTIONS).student.state_dict()
    trainer_step = TrainerStep(size, weights, [*OPTIONS, *methods.OPTIONS], method)
    trainer = trainer_step.trainer
    trainer.iter = 17
    for _ in range(3):
        trainer_step()
    latest = trainer.storage.latest()
    assert latest["pseudo_labels/per_image"][0] > 0
    assert math.isfinite(latest["total_loss"][0])
    assert len(next(trainer._batches).labeled) == labeled_views


def test_break_down_times_every_part(capsys, monkeypatch):
    """The parts are methods that it looks up by name."""
    monkeypatch.setattr(
        step, "Detectron2Baseline", lambda size, _: Detectron2Baseline(size, OPTIONS)
    )
    monkeypatch.setattr(torch.Tensor, "backward", torch.Tensor.backward)  # is restored at the end
    step.break_down(SMALL, repeats=1, options=OPTIONS)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + 9


def test_loader_compares_equal_views(tmp_path):
    files = loader.write_jpegs(tmp_path, (48, 64), count=2)
    (*times, difference), stages = loader.compare(files, (40, 60), rounds=1)
    assert len(times) == 6
    assert 0 < difference < 1
    assert {stage for name, stage in stages if name == "ours"} >= set(loader.STAGES.values())
