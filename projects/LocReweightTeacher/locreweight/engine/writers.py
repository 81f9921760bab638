"""What is measured, written so that a resumed run goes on with it."""

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

logger = logging.getLogger(__name__)

PERIOD = 20  # iterations from one line to the next
WINDOW = 20  # iterations; Detectron2's writers smooth over so many
TIMES = ("time", "data_time", "eta_seconds")  # they tell of a process, not of the run

# name -> whether it is smoothed, and (value, iteration) of the last iterations
History = dict[str, tuple[bool, list[tuple[float, int]]]]


class ResumableWriter(PeriodicWriter):
    """Detectron2's, with Detectron2's writers; after a stop all curves go on as if without one.

    Attributes:
        period: iterations from one line to the next.
        truncate_on_resume: what a stopped run wrote after the point where this one begins is removed, as
            it will be written again.
    """

    def __init__(self, folder: str) -> None:
        """
        Args:
            folder: of ``metrics.json`` and of TensorBoard's files.
        """
        super().__init__([], PERIOD)
        self.period = PERIOD
        self.truncate_on_resume = False
        self._folder = Path(folder)
        self._history: History = {}
        self._written = -1  # the last iteration of which something is in metrics.json
        self._json_writer: JSONWriter | None = None

    def before_train(self) -> None:
        for name, (smoothed, values) in self._history.items():
            for value, iteration in values:
                self.trainer.storage.put_scalar(name, value, smoothed, iteration)
        if comm.is_main_process():
            self._writers = self._build_writers()

    def _build_writers(self) -> list[EventWriter]:
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / "metrics.json"
        purge = {}
        if self.truncate_on_resume:
            truncate_after(file, self._written)
            purge = {"purge_step": self._written + 1}
        self._json_writer = JSONWriter(str(file))
        tensorboard = TensorboardXWriter(str(self._folder), **purge)
        # There is no other way to tell them what has been written before.
        self._json_writer._last_write = tensorboard._last_write = self._written
        printers = [CommonMetricPrinter(self.trainer.max_iter), PseudoLabelPrinter()]
        return [LenientWriter(w) for w in (*printers, self._json_writer, tensorboard)]

    def after_train(self) -> None:
        """Writes nothing more, unlike Detectron2's: after a stop it is the resumed run's affair."""
        for writer in self._writers:
            writer.close()

    def state_dict(self) -> dict:
        if self._json_writer is None:  # training has not begun
            return {"written": self._written, "history": self._history}
        return {"written": self._json_writer._last_write, "history": recent(self.trainer.storage)}

    def load_state_dict(self, state: dict) -> None:
        self._written, self._history = state["written"], state["history"]


class PseudoLabelPrinter(EventWriter):
    """Prints what mutual learning measures; Detectron2's own printer shows losses only."""

    def write(self) -> None:
        storage = get_event_storage()
        measured = {
            name: value
            for name, (value, iteration) in storage.latest_with_smoothing_hint(WINDOW).items()
            if name.startswith(("pseudo_labels/", "proposals/")) and iteration == storage.iter
        }
        if measured:
            numbers = "  ".join(f"{name}: {value:.3g}" for name, value in measured.items())
            logger.info("iter: %d  %s", storage.iter, numbers)


def recent(storage: EventStorage) -> History:
    """As much of what was measured as smoothing needs."""
    hints = storage.smoothing_hints()
    return {
        name: (hints[name], history.values()[-storage.count_samples(name, WINDOW) :])
        for name, history in storage.histories().items()
        if name not in TIMES
    }


def truncate_after(file: Path, iteration: int) -> None:
    """Cut lines of later iterations, and one that was not written to its end, off a file's end.

    Args:
        file: a JSON object with ``iteration`` in each line; need not exist.
        iteration: the last one to be kept.
    """
    if not file.exists():
        return
    lines = file.read_bytes().splitlines(keepends=True)
    while lines and _is_after(lines[-1], iteration):
        lines.pop()
    # In one call of the system: there is no moment at which half of it is done.
    os.truncate(file, sum(map(len, lines)))


def _is_after(line: bytes, iteration: int) -> bool:
    try:
        return not line.endswith(b"\n") or json.loads(line)["iteration"] > iteration
    except (KeyError, TypeError, ValueError):  # half of a line: the disk was full
        return True


# --------------------------------------------------------------------------------------------------
# Metrics that cannot be written must not end a training.


class LenientWriter(EventWriter):
    """Another writer, whose failure to write is said, once until it succeeds again.

    Some of what it could not write on a full disk is lost; checkpoints do not depend on it.
    """

    def __init__(self, writer: EventWriter) -> None:
        self._writer = writer
        self._fails = False

    def write(self) -> None:
        try:
            self._writer.write()
        except OSError as error:
            self._say(error)
        else:
            self._fails = False

    def close(self) -> None:
        try:
            self._writer.close()
        except OSError as error:
            self._say(error)

    def _say(self, error: OSError) -> None:
        if not self._fails:
            name = type(self._writer).__name__
            logger.error("%s cannot write its metrics: %s. Training goes on", name, error)
        self._fails = True
