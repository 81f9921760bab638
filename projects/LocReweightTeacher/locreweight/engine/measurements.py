"""What steps measured, left on the device until somebody looks: reading it means waiting for it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from detectron2.utils import comm
from torch import Tensor

from .reports import StepReport
from .step import StepResult

# Field of StepReport -> name -> scalar.
Fields = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class _Step:
    iteration: int
    reports: list[StepReport]  # of all processes, still without what the device measured
    fields: Fields  # of this process


class Measurements:
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
