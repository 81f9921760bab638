"""Metrics of training steps, kept on the device until they are logged.

Reading a number from a GPU waits for all work queued on it. Steps therefore only store their
metrics; they are transferred together when a line is logged or a checkpoint is written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from detectron2.utils import comm
from torch import Tensor

from .training_step import HIGHEST_SCORE, StepResult

# Field of StepReport -> name -> scalar.
Fields = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class StepReport:
    """What one process knows about its training step.

    All processes read the reports of all processes, and so make the same decisions.

    Attributes:
        images: files of its batch.
        data_time: seconds spent waiting for the batch.
        stop: whether this process was asked to stop.
        unread: one message for each unlabeled image that could not be read.
        failure: error that ended the step before there were losses; empty if there was none.
        losses: as in :class:`.training_step.StepResult`; empty if the step failed.
        metrics: likewise.
        gradients: parameter -> largest absolute value in its gradient.
    """

    images: list[str]
    data_time: float
    stop: bool
    unread: list[str] = field(default_factory=list)
    failure: str = ""
    losses: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, float] = field(default_factory=dict)

    @property
    def problem(self) -> str:
        """The failure, or the losses that are not finite; empty if all are finite."""
        wrong = [f"{name} is {x}" for name, x in self.losses.items() if not math.isfinite(x)]
        return self.failure or ", ".join(wrong)

    @property
    def gradient_problem(self) -> str:
        """Names a parameter whose gradient is not finite; empty if all are finite."""
        wrong = [name for name, largest in self.gradients.items() if not math.isfinite(largest)]
        if not wrong:
            return ""
        return f"the gradient of {len(wrong)} parameters is not finite, such as {wrong[0]}"


@dataclass(frozen=True)
class _Step:
    iteration: int
    reports: list[StepReport]  # of all processes, without values from the device
    fields: Fields  # values from the device, of this process


class DeferredMetrics:
    """Metrics of the steps since they were last fetched."""

    def __init__(self) -> None:
        self._steps: list[_Step] = []

    def add(
        self,
        iteration: int,
        reports: list[StepReport],
        result: StepResult | None = None,
        update: Fields | None = None,
    ) -> None:
        """Store a step without waiting for the device.

        Args:
            iteration: of the step.
            reports: of all processes, with what each knows without its device.
            result: losses and metrics of this process; None if the step failed in any process.
            update: further fields of this process's report.
        """
        fields = {} if result is None else {"losses": result.losses, "metrics": result.metrics}
        # Detached: a loss would keep its graph alive.
        detached = {
            field: {name: tensor.detach() for name, tensor in named.items()}
            for field, named in (fields | (update or {})).items()
        }
        self._steps.append(_Step(iteration, reports, detached))

    def fetch(self) -> list[tuple[int, list[StepReport]]]:
        """Return and forget all stored steps: iteration, and complete reports of all processes.

        Call it in all processes in the same iteration. All values are transferred at once.
        """
        steps, self._steps = self._steps, []
        tensors = [t for step in steps for field in step.fields.values() for t in field.values()]
        numbers = iter(_to_host(tensors))
        own = [
            {field: {name: next(numbers) for name in named} for field, named in step.fields.items()}
            for step in steps
        ]
        gathered = comm.all_gather(own)
        return [
            (
                step.iteration,
                [replace(report, **gathered[rank][i]) for rank, report in enumerate(step.reports)],
            )
            for i, step in enumerate(steps)
        ]


def _to_host(scalars: list[Tensor]) -> list[float]:
    if not scalars:
        return []
    # Some metrics are on the CPU, such as numbers of pseudo-labels. Copying them to the device does
    # not wait for it; copying the others to the CPU one by one would.
    device = next((t.device for t in scalars if t.device.type != "cpu"), scalars[0].device)
    return torch.stack([t.to(device, torch.float32, non_blocking=True) for t in scalars]).tolist()


def describe_problems(reports: list[StepReport]) -> str:
    """The problems of all processes, each with its process; empty if there are none."""
    problems = [
        f"{report.problem} in process {i}" for i, report in enumerate(reports) if report.problem
    ]
    return "; ".join(problems)


def average_metrics(reports: list[StepReport]) -> dict[str, float]:
    """Metrics to log for a step without problems.

    Returns:
        name -> mean over the processes in which the metric is not NaN (maximum for the highest
        score). A metric that is NaN in all processes is left out.
    """
    by_process = [report.losses | report.metrics for report in reports]
    known = {
        name: [values[name] for values in by_process if not math.isnan(values[name])]
        for name in by_process[0]
    }
    logged = {name: sum(values) / len(values) for name, values in known.items() if values}
    if HIGHEST_SCORE in logged:
        logged[HIGHEST_SCORE] = max(known[HIGHEST_SCORE])
    logged["total_loss"] = sum(logged[name] for name in reports[0].losses)
    logged["data_time"] = max(report.data_time for report in reports)
    return logged
