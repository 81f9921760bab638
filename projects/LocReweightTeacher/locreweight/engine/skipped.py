"""Steps that are left out because a number in them is not finite."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import torch
from detectron2.utils import comm
from torch import nn

from ..errors import UsageError
from .reports import StepReport

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

    def add(self, iteration: int, problem: str, reports: list[StepReport]) -> None:
        """Write down a step that was left out.

        Args:
            iteration: which step.
            problem: what was not finite.
            reports: of all processes, in their order.

        Raises:
            UsageError: if this was one too many.
        """
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

    def end_of_row(self) -> None:
        """A step was not left out."""
        self._in_a_row = 0

    def state_dict(self) -> dict[str, int]:
        return {"total": self.total, "in_a_row": self._in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.total, self._in_a_row = state["total"], state["in_a_row"]


def gradient_problem(model: nn.Module) -> str:
    """Names a parameter whose gradient is not finite; empty if all are."""
    named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    # Of all gradients together: the largest number in them, with one transfer from the device.
    largest = nn.utils.get_total_norm([gradient for _, gradient in named], norm_type=math.inf)
    if math.isfinite(largest.item()):
        return ""
    wrong = [name for name, gradient in named if not torch.isfinite(gradient).all()]
    return f"the gradient of {len(wrong)} parameters is not finite, such as {wrong[0]}"


def _strict(number: float) -> float | str:
    return number if math.isfinite(number) else str(number)  # JSON has no word for NaN
