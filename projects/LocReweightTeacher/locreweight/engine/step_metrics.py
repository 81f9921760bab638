"""What steps measured, left on the device until somebody looks: reading it means waiting for it."""

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
class _Step:
    iteration: int
    reports: list[StepReport]  # of all processes, still without what the device measured
    fields: Fields  # of this process


class DeferredMetrics:
    """Those of the steps since they were last fetched."""

    def __init__(self) -> None:
        self._steps: list[_Step] = []

    def add(
        self,
        iteration: int,
        reports: list[StepReport],
        result: StepResult | None = None,
        update: Fields | None = None,
    ) -> None:
        """Remember a step, without waiting for the device.

        Args:
            iteration: which step.
            reports: of all processes, with what each of them knows without its device.
            result: what this process measured; None if the step broke off in any process.
            update: further fields of its report.
        """
        fields = {} if result is None else {"losses": result.losses, "metrics": result.metrics}
        # Detached: a loss would hold on to its graph.
        kept = {
            field: {name: tensor.detach() for name, tensor in named.items()}
            for field, named in (fields | (update or {})).items()
        }
        self._steps.append(_Step(iteration, reports, kept))

    def fetch(self) -> list[tuple[int, list[StepReport]]]:
        """Iteration and complete reports of all processes, step after step; forgets them.

        To be called on all processes in the same iteration. There is one transfer from the device
        for all numbers of all steps.
        """
        steps, self._steps = self._steps, []
        tensors = [t for step in steps for field in step.fields.values() for t in field.values()]
        numbers = iter(_to_host(tensors))
        own = [
            {field: {name: next(numbers) for name in named} for field, named in step.fields.items()}
            for step in steps
        ]
        everyone = comm.all_gather(own)
        return [
            (
                step.iteration,
                [replace(report, **everyone[rank][i]) for rank, report in enumerate(step.reports)],
            )
            for i, step in enumerate(steps)
        ]


def _to_host(scalars: list[Tensor]) -> list[float]:
    if not scalars:
        return []
    # Counts of pseudo-labels were never on the device; on the way there nobody waits.
    device = next((t.device for t in scalars if t.device.type != "cpu"), scalars[0].device)
    return torch.stack([t.to(device, torch.float32, non_blocking=True) for t in scalars]).tolist()


# --------------------------------------------------------------------------------------------------
# What each process measured in a step. All of them read all reports, and so decide alike.


@dataclass(frozen=True)
class StepReport:
    """Of one process.

    Attributes:
        images: files of its batch.
        data_time: seconds it waited for the batch.
        stop: whether it was asked to stop.
        unread: why unlabeled images could not be read, a message for each.
        failure: why the step broke off before there were losses.
        losses, metrics: as in :class:`.step.StepResult`; none if the step failed.
        gradients: parameter -> the largest absolute number in its gradient.
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
        """What about the losses is not finite; empty if all is well."""
        wrong = [f"{name} is {x}" for name, x in self.losses.items() if not math.isfinite(x)]
        return self.failure or ", ".join(wrong)

    @property
    def gradient_problem(self) -> str:
        """Names a parameter whose gradient is not finite; empty if all are."""
        wrong = [name for name, largest in self.gradients.items() if not math.isfinite(largest)]
        if not wrong:
            return ""
        return f"the gradient of {len(wrong)} parameters is not finite, such as {wrong[0]}"


def describe_problems(reports: list[StepReport]) -> str:
    """Which process met what that is not finite; empty if none did."""
    found = [
        f"{report.problem} in process {i}" for i, report in enumerate(reports) if report.problem
    ]
    return "; ".join(found)


def average_metrics(reports: list[StepReport]) -> dict[str, float]:
    """What is to be logged of a step without problems, by name.

    The mean over all processes that measured it (of the highest score the highest), without what
    none of them could.
    """
    everyone = [report.losses | report.metrics for report in reports]
    known = {
        name: [values[name] for values in everyone if not math.isnan(values[name])]
        for name in everyone[0]
    }
    logged = {name: sum(values) / len(values) for name, values in known.items() if values}
    if HIGHEST_SCORE in logged:
        logged[HIGHEST_SCORE] = max(known[HIGHEST_SCORE])
    logged["total_loss"] = sum(logged[name] for name in reports[0].losses)
    logged["data_time"] = max(report.data_time for report in reports)
    return logged
