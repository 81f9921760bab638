"""Resuming a run with another number of processes than it had before.

With ``SOLVER.REFERENCE_WORLD_SIZE`` the number of images per iteration follows the number of
processes, so an earlier iteration has more or fewer images than a later one. Everything in a
checkpoint that counts iterations is converted, so that the run continues at the same images.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from ..file_io import atomic_write_bytes
from .writers import truncate_after


@dataclass(frozen=True)
class ProcessChange:
    """Change of the number of processes, and with it of the number of images per iteration.

    Attributes:
        before, now: earlier and present number of processes.
        done_before: completed iterations, counted with the earlier number.
        burn_in_before: iterations of burn-in, counted with the earlier number.
        burn_in: the same, counted with the present number.
        max_iter: iterations of the whole training, counted with the present number.
    """

    before: int
    now: int
    done_before: int
    burn_in_before: int
    burn_in: int
    max_iter: int

    @classmethod
    def between(cls, state: dict[str, Any], cfg: CfgNode, processes: int) -> ProcessChange | None:
        """The change that a resumed run has to convert; None if there is none.

        Args:
            state: of the trainer, from a checkpoint. Older checkpoints lack the number of
                processes, which is then taken to be the same.
            cfg: scaled to the present number of processes.
            processes: the present number.
        """
        before, burn_in_before = state.get("processes", processes), state["burn_in"]
        if before == processes or not cfg.SOLVER.REFERENCE_WORLD_SIZE:
            return None
        factor = before / processes
        burn_in = round(burn_in_before * factor)
        # Both are rounded from the same length of burn-in, unless its key was changed as well.
        if abs(burn_in - cfg.SEMI.BURN_IN_ITERS) <= max(factor, 1.0):
            burn_in = cfg.SEMI.BURN_IN_ITERS
        done = state["iteration"] + 1
        return cls(before, processes, done, burn_in_before, burn_in, cfg.SOLVER.MAX_ITER)

    def done(self, before: int) -> int:
        """Convert a number of iterations that were done, rounded down.

        The end of burn-in stays exactly where it is, because it is where the stream of unlabeled
        images begins.
        """
        if before < self.burn_in_before:
            done = min(before * self.before // self.now, self.burn_in)
        else:
            done = self.burn_in + (before - self.burn_in_before) * self.before // self.now
        return min(done, self.max_iter)  # the length of training was rounded, too

    def index(self, before: int) -> int:
        """Convert the index of an iteration, which counts from 0; -1 is before the first one."""
        return self.done(before + 1) - 1

    def convert_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """Convert the state of the trainer."""
        last = state["iteration"]
        iteration = self.index(last)
        behind = {name: last - finished for name, finished in state["finished"].items()}
        return state | {
            "iteration": iteration,
            "burn_in": self.burn_in,
            "finished": {name: iteration - min(1, n) for name, n in behind.items()},
            "hooks": self._convert_hooks(state["hooks"]),
        }

    def _convert_hooks(self, hooks: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        hooks = {name: dict(state) for name, state in hooks.items()}
        if schedule := hooks.get("lr_schedule"):
            schedule["last_epoch"] = self.done(schedule["last_epoch"])
            schedule["base_lrs"] = [x * self.now / self.before for x in schedule["base_lrs"]]
        if (best := hooks.get("best_model")) and best["best_iter"] is not None:
            best["best_iter"] = self.index(best["best_iter"])
        if stopping := hooks.get("early_stopping"):
            stopping["improved_at"] = self.done(stopping["improved_at"])
        if metrics := hooks.get("metrics"):
            metrics["written"] = self.index(metrics["written"])
            metrics["history"] = {
                name: (smoothed, [(value, self.index(i)) for value, i in values])
                for name, (smoothed, values) in metrics["history"].items()
            }
        return hooks

    def convert_lines(self, file: Path) -> None:
        """Convert the iterations in a JSON Lines file, and remove those that are done again.

        Args:
            file: each line is a JSON object with the key ``iteration``; the file may be missing.
        """
        if not file.exists():
            return
        truncate_after(file, self.done_before - 1)
        converted = []
        for line in file.read_bytes().splitlines():
            with suppress(ValueError):  # a line that a full disk has cut off
                record = json.loads(line)
                converted.append(record | {"iteration": self.index(record["iteration"])})
        atomic_write_bytes(file, "".join(json.dumps(x) + "\n" for x in converted).encode())

    def describe(self, cfg: CfgNode) -> str:
        """What changes, in one line; ``cfg`` is scaled to the present number of processes."""
        solver, factor = cfg.SOLVER, self.before / self.now
        batches = solver.IMS_PER_BATCH, solver.IMS_PER_BATCH_UNLABELED
        labeled, unlabeled = (round(images * factor) for images in batches)
        return (
            f"resumed with {self.now} process(es) instead of {self.before}: {batches[0]} labeled + "
            f"{batches[1]} unlabeled images per iteration instead of {labeled} + {unlabeled}, "
            f"learning rate {solver.BASE_LR:g} instead of {solver.BASE_LR * factor:g}, "
            f"{self.done(self.done_before)} of {solver.MAX_ITER} iterations done instead of "
            f"{self.done_before} of {round(solver.MAX_ITER / factor)}"
        )
