"""Stages, progress and remaining time of a training, on the console."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from detectron2.engine import HookBase
from tqdm import tqdm

from .console import CONSOLE
from .remaining_time import RemainingTime, Schedule, Work, format_duration
from .writers import WINDOW

LINE_SECONDS = 60.0  # between two lines where there is no terminal
_BAR = "{desc}: {percentage:3.0f}%|{bar:24}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


class Progress(HookBase):
    """Shows a progress bar on a terminal, and elsewhere a line now and then.

    It must be the last hook, because it measures the duration of iterations with all hooks. Use it
    in the main process only.
    """

    def __init__(
        self, remaining_time: RemainingTime, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """
        Args:
            remaining_time: gets the measured durations.
            clock: returns seconds.
        """
        self._remaining_time = remaining_time
        self._schedule = remaining_time.schedule
        self._clock = clock
        self._stage = ""
        self._bar: tqdm | None = None
        self._last_step = self._last_line = self._start = 0.0

    def before_train(self) -> None:
        self._start = self._last_line = self._clock()
        self._bar = tqdm(
            total=self.trainer.max_iter,
            initial=self.trainer.start_iter,
            bar_format=_BAR,
            dynamic_ncols=True,
            file=sys.stdout,
            disable=None,  # shown on terminals only
        )

    def before_step(self) -> None:
        done = self.trainer.iter + 1
        stage = _stage(self._schedule, done)
        if stage != self._stage:
            self._stage = stage
            CONSOLE.info("%s", _describe_stage(self._schedule, done))
            if self._bar is not None:
                self._bar.set_description_str(stage)

    def show_evaluation(self) -> None:
        """Show that an evaluation is running."""
        if self._bar is not None:
            self._bar.set_postfix_str("evaluating")

    def after_step(self) -> None:
        now, done = self._clock(), self.trainer.iter + 1
        if self.trainer.iter > self.trainer.start_iter:  # the first iteration also sets things up
            self._remaining_time.add(done, now - self._last_step)
        self._last_step = now
        if self._bar is None:
            return
        if not self._bar.disable:
            self._bar.set_postfix_str(self._describe(done), refresh=False)
            self._bar.update()
        elif now - self._last_line >= LINE_SECONDS and done < self.trainer.max_iter:
            self._last_line = now
            CONSOLE.info("iter %d of %d: %s", done, self.trainer.max_iter, self._describe(done))

    def after_train(self) -> None:
        if self._bar is not None:
            self._bar.close()

    @property
    def duration(self) -> str:
        """Time since training started, formatted."""
        return format_duration(self._clock() - self._start)

    def _describe(self, done: int) -> str:
        """Remaining time, speed, loss, and pseudo-labels after burn-in; what is known of them."""
        parts = []
        if estimate := self._remaining_time.estimate(done):
            parts.append(str(estimate))
        if seconds := self._remaining_time.seconds_per_step(done):
            parts.append(f"{seconds:.2g} s/iter")
        histories = self.trainer.storage.histories()
        for name, text in {
            "total_loss": "loss {:.2f}",
            "pseudo_labels/per_image": "{:.1f} pseudo-labels per image",
        }.items():
            if name in histories:
                parts.append(text.format(histories[name].median(WINDOW)))
        return ", ".join(parts)


def _stage(schedule: Schedule, done: int) -> str:
    if schedule.burn_in == schedule.max_iter:
        return "supervised training"
    return "burn-in" if schedule.step(done) is Work.BURN_IN else "mutual learning"


def _describe_stage(schedule: Schedule, done: int) -> str:
    burning_in = schedule.step(done) is Work.BURN_IN
    last = schedule.burn_in if burning_in else schedule.max_iter
    images = "labeled images" if burning_in else "labeled and unlabeled images"
    return f"{_stage(schedule, done)}: iterations {done} to {last}, on {images}"
