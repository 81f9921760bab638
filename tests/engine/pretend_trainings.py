"""Program that trains on the pretend device and on the CPU, and compares the two.

    python -m tests.engine.pretend_trainings FOLDER

Writes into the folder

- results.json: name -> fields of :class:`Result`;
- answers.json: name in OPERATIONS -> error or waits of the device.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from locreweight.engine import SemiSupervisedTrainer
from locreweight.engine import writers as metrics_module
from tests.engine.pretend_device import DEVICE, NAME, PretendDevice
from tests.engine.tiny_training import (
    METHODS,
    build_trainer,
    copy_of,
    make_datasets,
    training_config,
)

BURN_IN, ITERATIONS, PERIOD = 1, 2, 2  # one step of each phase, and then a line of the log
ON_THE_DEVICE = {"MODEL.DEVICE": NAME}
SCHEDULE = {"SEMI.BURN_IN_ITERS": BURN_IN, "SOLVER.MAX_ITER": ITERATIONS}
OPERATIONS: dict[str, Callable[[Tensor], Any]] = {
    "with the host's": lambda far: far + torch.ones(2),
    "stacked with the host's": lambda far: torch.stack([far.sum(), torch.ones(())]),
    "index into the host's": lambda far: torch.ones(2)[far.long()],
    "numpy": lambda far: far.numpy(),
    "sum": lambda far: far.sum(),
    "with a number of the host's": lambda far: far + torch.ones(()),
    "index": lambda far: far[far.long() - 1],
    "copied in passing": lambda far: torch.ones(2).to(far.device, non_blocking=True),
    "item": lambda far: far.sum().item(),
    "tolist": lambda far: far.tolist(),
    "nonzero": lambda far: far.nonzero(),
    "mask": lambda far: far[far > 0],
    "index of the host's": lambda far: far[[0, 1]],
    "new tensor": lambda far: far.new_tensor([1.0]),
    "to the device": lambda far: torch.ones(2).to(far.device),
    "to the host": lambda far: far.cpu(),
    "copied into the host's": lambda far: torch.ones(2).copy_(far),
}


@dataclass(frozen=True)
class Result:
    """Outcome of a training on the device.

    Attributes:
        moved: largest absolute change of the student's weights during training.
        difference: largest absolute difference between its final weights and the CPU's.
        burn_in: place -> number of waits in burn-in steps.
        mutual: the same for steps after burn-in.
        last_metrics: the last line of metrics.json.
    """

    moved: float
    difference: float
    burn_in: dict[str, int]
    mutual: dict[str, int]
    last_metrics: dict[str, float]


def compare(datasets: dict, folder: Path, settings: dict) -> Result:
    """Train on the device and on the CPU."""
    waits: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    with PretendDevice() as device:
        trainer = trainer_for(datasets, folder / "device", settings | ON_THE_DEVICE)
        before = weights_of(trainer)
        count_waits(trainer, device, waits)
        trainer.train()
        after = weights_of(trainer)
    # Compared in float32 only: autocast has no effect on the pretend device.
    exact = settings | {"SOLVER.AMP.ENABLED": False}
    reference = trainer_for(datasets, folder / "cpu", exact)
    reference.train()
    return Result(
        moved=largest_difference(before, after),
        difference=largest_difference(after, weights_of(reference)),
        burn_in=dict(waits[True]),
        mutual=dict(waits[False]),
        last_metrics=last_line(folder / "device"),
    )


def compare_everything(datasets: dict, folder: Path) -> Result:
    """Train with evaluation, checkpoints and panels, and resume on the device."""
    settings = {
        "DATASETS.TEST": datasets["DATASETS.TEST"],
        "TEST.EVAL_PERIOD": ITERATIONS,
        "SOLVER.CHECKPOINT_PERIOD": BURN_IN,
        "VIS_PERIOD": BURN_IN,
    }
    with PretendDevice():
        # Without evaluation, which takes long on the pretend device.
        first = settings | ON_THE_DEVICE | {"SOLVER.MAX_ITER": BURN_IN, "DATASETS.TEST": ()}
        trainer = trainer_for(datasets, folder / "device", first)
        trainer.train()
    return compare(datasets, folder, settings)


def trainer_for(datasets: dict, folder: Path, settings: dict) -> SemiSupervisedTrainer:
    """A trainer that resumes from the folder if it has checkpoints."""
    return build_trainer(training_config(datasets, folder, SCHEDULE | settings), resume=True)


def count_waits(
    trainer: SemiSupervisedTrainer, device: PretendDevice, waits: dict[bool, Counter[str]]
) -> None:
    """Count the waits of each step of the trainer by phase: key True is burn-in."""
    run_step = trainer.run_step

    def counted() -> None:
        device.waits.clear()
        run_step()
        waits[trainer.iter < BURN_IN].update(device.waits)

    trainer.run_step = counted  # type: ignore[method-assign]


def weights_of(trainer: SemiSupervisedTrainer) -> dict[str, Tensor]:
    return {name: weight.to("cpu") for name, weight in copy_of(trainer.student).items()}


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    return max((first[name] - second[name]).abs().max().item() for name in first)


def last_line(folder: Path) -> dict[str, float]:
    return json.loads((folder / "metrics.json").read_text().splitlines()[-1])


def answer(operation: Callable[[Tensor], Any]) -> str:
    """The error, the places where the CPU waits, or "nothing"."""
    with PretendDevice() as device:
        far = torch.ones(2, device=DEVICE)
        try:
            operation(far)
        except (RuntimeError, TypeError) as error:
            return str(error)
        return ", ".join(device.waits) or "nothing"


def main(folder: Path) -> None:
    metrics_module.PERIOD = PERIOD
    datasets = make_datasets(folder / "datasets")
    results = {
        name: compare(datasets, folder / name, {"SEMI.METHOD": name} | settings)
        for name, settings in METHODS.items()
    }
    half = {"SOLVER.AMP.ENABLED": True}
    results["float16"] = compare(datasets, folder / "float16", half)
    results["everything"] = compare_everything(datasets, folder / "everything")
    answers = {name: answer(operation) for name, operation in OPERATIONS.items()}
    (folder / "answers.json").write_text(json.dumps(answers))
    (folder / "results.json").write_text(
        json.dumps({name: asdict(r) for name, r in results.items()})
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
