"""The step does not wait for the device where the mathematics does not ask for it.

On a GPU reading a number means waiting for all that was asked for before. Calls are counted on the
CPU, where they cost nothing but are the same ones.
"""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

import locreweight
from locreweight.engine import metrics

PACKAGE = Path(locreweight.__file__).parent
READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")
SIZES = ("nonzero", "masked_select", "unique")  # how many rows there are has to be known


def asks_for_a_size(name, args):
    """Also hidden: by an index that is a mask, or a list, which is copied to the device."""
    if name != "__getitem__":
        return name in SIZES
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    masks = (isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in index)
    return any(masks) or any(isinstance(i, list) for i in index)


class Waiting(TorchFunctionMode):
    """Counts, by function, what this package's own code asks of tensors that a host waits for."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        code = sys._getframe(1).f_code
        name = getattr(func, "__name__", "")
        # Written out, and not the device of some other tensor, which here is the CPU as well.
        to_cpu = name == "to" and any(isinstance(a, str) and a == "cpu" for a in args[1:])
        folders = Path(code.co_filename).parents
        # What makes images works on the host, here in the trainer's process.
        is_step = PACKAGE in folders and PACKAGE / "data" not in folders
        if is_step and (to_cpu or name in READS or asks_for_a_size(name, args)):
            self.calls[f"{code.co_name}: {name}"] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("strategy", "iterations", "period"),
    [
        ("LocReweight", 3, 3),
        ("LocReweight", 6, 3),
        ("LocReweight", 6, 2),
        ("ShuffledLocReweight", 3, 3),
    ],
)
def test_what_was_measured_is_read_once_a_logging_period(
    make_trainer, monkeypatch, strategy, iterations, period
):
    monkeypatch.setattr(metrics, "PERIOD", period)
    settings = {"SEMI.STRATEGY": strategy, "SEMI.BURN_IN_ITERS": 0, "SOLVER.MAX_ITER": iterations}
    trainer = make_trainer(settings)
    run_step = trainer.run_step
    waiting = Waiting()

    def counted():
        with waiting:
            run_step()

    monkeypatch.setattr(trainer, "run_step", counted)
    trainer.train()
    assert waiting.calls.pop("_to_host: tolist") == iterations / period
    # Of each unlabeled image, which predictions of the teacher are finite,
    assert waiting.calls.pop("inference: __getitem__") == 2 * iterations
    # which detections are pseudo-labels, and which of them are in sight.
    assert waiting.calls.pop("select_pseudo_labels: nonzero") == 2 * iterations
    assert waiting.calls.pop("to_strong_view: nonzero") == 2 * iterations
    # Rows that are regressed, of labeled and of unlabeled images: as many as are foreground.
    assert waiting.calls.pop("foreground: nonzero") == 2 * iterations
    assert not waiting.calls


def test_the_count_would_notice_a_loss_that_is_read(make_trainer, monkeypatch):
    """An oracle of the test itself: with a report after each iteration it is not once a period."""
    trainer = make_trainer({"SEMI.BURN_IN_ITERS": 0, "SOLVER.MAX_ITER": 1})
    trainer.train()
    waiting = Waiting()
    with waiting:
        trainer._measurements.add(0, [], None, {"gradients": {"a": torch.ones(())}})
        trainer._measurements.fetch()
    assert waiting.calls == {"_to_host: tolist": 1}
