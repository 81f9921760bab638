"""Metric writers that continue correctly after a resume and do not fail on a full disk."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from detectron2.engine.hooks import PeriodicWriter
from detectron2.utils import comm
from detectron2.utils.events import (
    CommonMetricPrinter,
    EventStorage,
    EventWriter,
    JSONWriter,
    TensorboardXWriter,
    get_event_storage,
)

from ..run_files import METRICS_FILE
from .remaining_time import RemainingTime, format_duration

logger = logging.getLogger(__name__)

PERIOD = 20  # iterations between two lines
WINDOW = 20  # iterations over which Detectron2's writers smooth
TIMES = ("time", "data_time", "eta_seconds")  # metrics of the process, which are not resumed

# name -> (whether it is smoothed, [(value, iteration)] of the last iterations)
History = dict[str, tuple[bool, list[tuple[float, int]]]]


class ResumableWriter(PeriodicWriter):
    """Writes metrics with Detectron2's writers; all curves continue after a resume.

    Attributes:
        period: iterations between two lines.
        truncate_on_resume: remove what a stopped run wrote after the iteration that this run starts
            at, because it is going to be written again.
    """

    def __init__(self, folder: str, remaining_time: RemainingTime) -> None:
        """
        Args:
            folder: for ``metrics.json`` and TensorBoard's files.
            remaining_time: is logged. Its schedule says when there are evaluations: their results
                are written at once, because the next evaluation replaces them.
        """
        super().__init__([], PERIOD)
        self.period = PERIOD
        self.truncate_on_resume = False
        self._folder = Path(folder)
        self._remaining_time = remaining_time
        self._history: History = {}
        self._written = -1  # last iteration in metrics.json
        self._json_writer: JSONWriter | None = None

    def before_train(self) -> None:
        for name, (smoothed, values) in self._history.items():
            for value, iteration in values:
                self.trainer.storage.put_scalar(name, value, smoothed, iteration)
        if comm.is_main_process():
            self._writers = self._build_writers()

    def _build_writers(self) -> list[EventWriter]:
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / METRICS_FILE
        purge = {}
        if self.truncate_on_resume:
            truncate_after(file, self._written)
            purge = {"purge_step": self._written + 1}
        self._json_writer = JSONWriter(str(file))
        tensorboard = TensorboardXWriter(str(self._folder), **purge)
        # Detectron2 has no public way to set the last iteration that was written.
        self._json_writer._last_write = tensorboard._last_write = self._written
        printers = [MetricPrinter(self._remaining_time), PseudoLabelPrinter()]
        return [LenientWriter(w) for w in (*printers, self._json_writer, tensorboard)]

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        is_due = done % self.period == 0 or self._remaining_time.schedule.evaluated_models(done)
        if is_due or self.trainer.is_last_iteration:
            for writer in self._writers:
                writer.write()

    def after_train(self) -> None:
        """Close the files. Unlike Detectron2, write nothing: after a stop the resumed run does."""
        for writer in self._writers:
            writer.close()

    def state_dict(self) -> dict:
        if self._json_writer is None:  # before training, and in other than the main process
            return {"written": self._written, "history": self._history}
        history = recent_history(self.trainer.storage)
        return {"written": self._json_writer._last_write, "history": history}

    def load_state_dict(self, state: dict) -> None:
        self._written, self._history = state["written"], state["history"]


class MetricPrinter(CommonMetricPrinter):
    """Detectron2's printer, with the remaining time of the whole training."""

    def __init__(self, remaining_time: RemainingTime) -> None:
        super().__init__()
        self._remaining_time = remaining_time

    def _get_eta(self, storage: EventStorage) -> str:
        estimate = self._remaining_time.estimate(storage.iter + 1)
        if estimate is None:
            return ""
        storage.put_scalar("eta_seconds", estimate.seconds, smoothing_hint=False)
        return format_duration(estimate.seconds)


class PseudoLabelPrinter(EventWriter):
    """Prints metrics of pseudo-labels and proposals. Detectron2's printer shows losses only."""

    def write(self) -> None:
        storage = get_event_storage()
        metrics = {
            name: value
            for name, (value, iteration) in storage.latest_with_smoothing_hint(WINDOW).items()
            if name.startswith(("pseudo_labels/", "proposals/")) and iteration == storage.iter
        }
        if metrics:
            text = "  ".join(f"{name}: {value:.3g}" for name, value in metrics.items())
            logger.info("iter: %d  %s", storage.iter, text)


class LenientWriter(EventWriter):
    """Wraps a writer and logs its I/O errors instead of raising them, once until it succeeds again.

    On a full disk some metrics are lost, but training continues.
    """

    def __init__(self, writer: EventWriter) -> None:
        self._writer = writer
        self._failing = False

    def write(self) -> None:
        try:
            self._writer.write()
        except OSError as error:
            self._log(error)
        else:
            self._failing = False

    def close(self) -> None:
        try:
            self._writer.close()
        except OSError as error:
            self._log(error)

    def _log(self, error: OSError) -> None:
        if not self._failing:
            name = type(self._writer).__name__
            logger.error("%s cannot write its metrics: %s. Training continues", name, error)
        self._failing = True


def recent_history(storage: EventStorage) -> History:
    """The newest values of each metric, as many as smoothing needs."""
    hints = storage.smoothing_hints()
    return {
        name: (hints[name], history.values()[-storage.count_samples(name, WINDOW) :])
        for name, history in storage.histories().items()
        if name not in TIMES
    }


def truncate_after(file: Path, iteration: int) -> None:
    """Remove lines of later iterations, and incomplete lines, from the end of a JSON Lines file.

    Args:
        file: each line is a JSON object with the key ``iteration``; the file may be missing.
        iteration: the last iteration to keep.
    """
    if not file.exists():
        return
    lines = file.read_bytes().splitlines(keepends=True)
    while lines and _is_after(lines[-1], iteration):
        lines.pop()
    # A single system call, so that a kill cannot leave the file half truncated.
    os.truncate(file, sum(map(len, lines)))


def _is_after(line: bytes, iteration: int) -> bool:
    try:
        return not line.endswith(b"\n") or json.loads(line)["iteration"] > iteration
    except (KeyError, TypeError, ValueError):  # an incomplete line, from a full disk
        return True
