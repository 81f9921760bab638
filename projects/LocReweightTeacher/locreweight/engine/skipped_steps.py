"""Steps that are left out because a number in them is not finite."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

from detectron2.utils import comm

from ..errors import UsageError
from .step_metrics import StepReport

logger = logging.getLogger(__name__)

FILE_NAME = "skipped_steps.jsonl"


class SkippedSteps:
    """Counts them, writes them down, and ends training when there are too many in a row.

    Attributes:
        total: number of them since the run began.
        file: one line of JSON for each step and process: iteration, process, problem, losses,
            images.
    """

    def __init__(self, folder: str, most_in_a_row: int) -> None:
        """
        Args:
            folder: of the file.
            most_in_a_row: so many end training; at least 1.
        """
        if most_in_a_row < 1:
            raise UsageError(f"SOLVER.MAX_SKIPPED_STEPS is {most_in_a_row}, but must be at least 1")
        self.file = Path(folder, FILE_NAME)
        self.total = 0
        self._in_a_row = 0
        self._most = most_in_a_row

    def judge(self, iteration: int, problem: str, reports: list[StepReport]) -> None:
        """Write down a step if it was left out.

        Args:
            iteration: which step; they come in order.
            problem: what of its losses was not finite; empty if all were.
            reports: of all processes, in their order.

        Raises:
            UsageError: if this was one too many in a row.
        """
        # The gradients are those of all processes together, alike in all of them.
        in_gradient = reports[0].gradient_problem
        if problem or (in_gradient and not has_loss_scale_left(reports[0])):
            self._add(iteration, problem or in_gradient, reports)
        elif not in_gradient:
            self._in_a_row = 0

    def _add(self, iteration: int, problem: str, reports: list[StepReport]) -> None:
        self.total += 1
        self._in_a_row += 1
        logger.warning(
            "step %d left out (%d in a row): %s. Its images and losses are in %s",
            iteration,
            self._in_a_row,
            problem,
            self.file,
        )
        if comm.is_main_process():
            try:
                self._write(iteration, problem, reports)
            except OSError as error:
                logger.error("cannot write %s: %s. Training goes on", self.file, error)
        if self._in_a_row >= self._most:
            raise UsageError(
                f"{self._in_a_row} steps in a row were left out, the last because {problem}; their "
                f"images and losses are in {self.file}. If the images are not at fault the "
                "weights are: lower SOLVER.BASE_LR or turn on SOLVER.CLIP_GRADIENTS, and start anew"
            )

    def _write(self, iteration: int, problem: str, reports: list[StepReport]) -> None:
        with self.file.open("a") as file:
            for rank, report in enumerate(reports):
                line = {
                    "iteration": iteration,
                    "process": rank,
                    "problem": problem,
                    "losses": {name: _strict(x) for name, x in report.losses.items()},
                    "images": report.images,
                }
                file.write(json.dumps(line) + "\n")

    def state_dict(self) -> dict[str, int]:
        return {"total": self.total, "in_a_row": self._in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.total, self._in_a_row = state["total"], state["in_a_row"]


def has_loss_scale_left(report: StepReport) -> bool:
    """Whether a gradient may be infinite because its scale is too large for float16.

    The scale then comes down by itself, until it is none.
    """
    return report.metrics.get("loss_scale", 0.0) >= 1.0


def _strict(number: float) -> float | str:
    return number if math.isfinite(number) else str(number)  # JSON has no word for NaN
