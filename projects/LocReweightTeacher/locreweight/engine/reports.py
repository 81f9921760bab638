"""What each process measured in a step. All of them read all reports, and so decide alike."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from .step import HIGHEST_SCORE


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


def problem_of(reports: list[StepReport]) -> str:
    """Which process met what that is not finite; empty if none did."""
    found = [
        f"{report.problem} in process {i}" for i, report in enumerate(reports) if report.problem
    ]
    return "; ".join(found)


def averages(reports: list[StepReport]) -> dict[str, float]:
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
