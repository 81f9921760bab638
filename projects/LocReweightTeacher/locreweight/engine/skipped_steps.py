"""Record of training steps that were skipped because a loss or gradient was not finite."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

from detectron2.utils import comm

from ..errors import UsageError
from ..run_files import SKIPPED_STEPS_FILE
from .step_metrics import StepReport, describe_problems

logger = logging.getLogger(__name__)


class SkippedSteps:
    """Counts skipped steps, writes them to a file, and stops training after too many in a row.

    Attributes:
        total: number of skipped steps since the run began.
        file: one JSON object per line for each skipped step and process, with the keys iteration,
            process, problem, losses and images.
    """

    def __init__(self, folder: str, max_in_a_row: int) -> None:
        """
        Args:
            folder: for the file.
            max_in_a_row: number of skipped steps in a row that stops training; at least 1.
        """
        if max_in_a_row < 1:
            raise UsageError(f"SOLVER.MAX_SKIPPED_STEPS is {max_in_a_row}, but must be at least 1")
        self.file = Path(folder, SKIPPED_STEPS_FILE)
        self.total = 0
        self._in_a_row = 0
        self._max = max_in_a_row

    def update(self, iteration: int, reports: list[StepReport]) -> None:
        """Count and record a step if it was skipped.

        Args:
            iteration: of the step; iterations come in order.
            reports: of all processes, in their order.

        Raises:
            UsageError: if there were too many skipped steps in a row.
        """
        problem = describe_problems(reports)
        # Gradients are averaged over the processes, so they are the same in all of them.
        in_gradient = reports[0].gradient_problem
        if problem or (in_gradient and not _can_lower_loss_scale(reports[0])):
            self._add(iteration, problem or in_gradient, reports)
        elif not in_gradient:
            self._in_a_row = 0

    def _add(self, iteration: int, problem: str, reports: list[StepReport]) -> None:
        self.total += 1
        self._in_a_row += 1
        logger.warning(
            "skipped step %d (%d in a row): %s. Its images and losses are in %s",
            iteration,
            self._in_a_row,
            problem,
            self.file,
        )
        if comm.is_main_process():
            try:
                self._write(iteration, problem, reports)
            except OSError as error:
                logger.error("cannot write %s: %s. Training continues", self.file, error)
        if self._in_a_row >= self._max:
            raise UsageError(
                f"{self._in_a_row} steps in a row were skipped, the last one because {problem}; "
                f"their images and losses are in {self.file}. If the images are correct, the "
                "weights have diverged: lower SOLVER.BASE_LR or turn on SOLVER.CLIP_GRADIENTS, and "
                "start a new run"
            )

    def _write(self, iteration: int, problem: str, reports: list[StepReport]) -> None:
        with self.file.open("a") as file:
            for rank, report in enumerate(reports):
                line = {
                    "iteration": iteration,
                    "process": rank,
                    "problem": problem,
                    "losses": {name: _as_json(x) for name, x in report.losses.items()},
                    "images": report.images,
                }
                file.write(json.dumps(line) + "\n")

    def state_dict(self) -> dict[str, int]:
        return {"total": self.total, "in_a_row": self._in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.total, self._in_a_row = state["total"], state["in_a_row"]


def _can_lower_loss_scale(report: StepReport) -> bool:
    """Whether a gradient may be infinite only because of its scale for float16.

    The scaler then lowers the scale, which is not counted as a skipped step.
    """
    return report.metrics.get("loss_scale", 0.0) >= 1.0


def _as_json(number: float) -> float | str:
    return number if math.isfinite(number) else str(number)  # JSON has no NaN
