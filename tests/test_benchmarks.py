"""The benchmarks measure what they say. How long anything takes is not tested."""

import math
from dataclasses import asdict

import pytest
import torch

from benchmarks import growth
from benchmarks.child import Cost
from benchmarks.timing import Clock, alternate, median_ratio, spread
from benchmarks.workload import Floor, Size, Step, UnbiasedTeacherPasses, make_batch
from tests.modeling.tiny_model import TINY, as_options

SMALL = Size(short_side=96, objects=3, classes=4, proposals=32)
OPTIONS = as_options(
    {key: value for key, value in TINY.items() if key.startswith(("MODEL.RESNETS", "MODEL.FPN"))}
    | {"MODEL.DEVICE": "cpu", "SOLVER.AMP.ENABLED": False}
)


def test_what_is_compared_takes_turns_and_begins_by_turns():
    calls = []
    works = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = alternate(works, repeats=3, warm_up=1)
    assert "".join(calls) == "abc" + "bca" + "cab" + "abc"
    assert {name: len(of) for name, of in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_ratios_are_those_of_one_repetition():
    seconds = {"a": [1.0, 20.0, 3.0], "b": [2.0, 10.0, 3.0]}
    assert median_ratio(seconds, "a", "b") == 1.0
    assert spread([3.0, 1.0, 2.0], 1000, 0) == "2000 (1000 to 3000)"


def test_a_clock_adds_up_the_calls_of_what_it_watches():
    class Owner:
        def twice(self, x):
            return 2 * x

    owner, clock = Owner(), Clock()
    clock.watch(owner, "twice", "doubling")
    assert [owner.twice(1), owner.twice(2)] == [2, 4]
    assert clock.seconds["doubling"] > 0


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_the_power_of_growth_is_read_off_the_last_two_points(power):
    points = [(x, Cost(x**power, 0.0, 0.0), Cost(x, 0.0, 0.0)) for x in (1.0, 2.0, 8.0)]
    of_step, of_floor = growth.slopes(points)
    assert float(of_step) == pytest.approx(power)
    assert float(of_floor) == pytest.approx(1.0)


@pytest.mark.parametrize("name", growth.SERIES)
def test_each_series_changes_one_thing(name):
    base, changed = asdict(growth.SMALL), set()
    for _, size in growth.SERIES[name]:
        changed |= {key for key, value in asdict(size).items() if value != base[key]}
    assert changed in (
        {"labeled", "unlabeled"},
        {"short_side"},
        {"proposals"},
        {"classes"},
        {"objects"},
    )


def test_the_same_batch_again_and_again():
    first, second = make_batch(SMALL), make_batch(SMALL)
    for one, other in zip(first.unlabeled, second.unlabeled, strict=True):
        assert torch.equal(one.weak.image, other.weak.image)
        assert one.weak.image.shape == (3, 96, 128)
    for sample in first.labeled:
        boxes = sample["instances"].gt_boxes
        assert len(boxes) == SMALL.objects and boxes.nonempty().all()
        assert (boxes.tensor >= 0).all()


@pytest.mark.parametrize("kind", [Floor, UnbiasedTeacherPasses])
def test_bare_detectron2_has_finite_numbers_on_calibrated_statistics(kind):
    floor = kind(SMALL, OPTIONS)
    floor()
    gradients = [p.grad for p in floor.student.parameters() if p.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)
    features = floor.student.backbone(torch.randn(1, 3, 96, 128))
    assert all(feature.abs().max() < 100 for feature in features.values())


def test_the_step_is_the_trainers_own_with_the_given_pseudo_labels():
    floor = Floor(SMALL, OPTIONS)
    weights = floor.student.state_dict()
    step = Step(SMALL, weights, OPTIONS)
    trainer = step.trainer
    for name, value in trainer.student.state_dict().items():
        assert "log_variance" in name or torch.equal(value, weights[name]), name
    trainer.iter = 18
    step()
    step()  # the 20th iteration: what was measured is read
    storage = trainer.storage
    assert storage.latest()["pseudo_labels/per_image"][0] == SMALL.objects
    assert math.isfinite(storage.latest()["total_loss"][0])
    assert storage.latest()["skipped_steps"][0] == 0
    assert trainer.iter == 20
