"""SIGTERM and SIGUSR1 ask a process to stop; the run is resumed later with ``--resume``.

During training, the current step is finished, all processes agree to stop, and a checkpoint is
saved. Where nothing would be lost (during setup and evaluation), the process exits immediately.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType

EXIT_CODE = 75  # EX_TEMPFAIL in sysexits.h: try again later
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Schedulers and launchers may deliver one signal several times. Signals within this time count as
# one.
SAME_SIGNAL_SECONDS = 1.0


class Stopped(SystemExit):
    """Exits the process with :data:`EXIT_CODE`."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


class StopRequest:
    """Whether this process was asked to stop; the instance is :data:`STOP_REQUEST`."""

    def __init__(self) -> None:
        self._received_at: float | None = None
        self._exits_at_once = True

    @property
    def received(self) -> bool:
        return self._received_at is not None

    def note(self) -> None:
        """Record a signal."""
        if self._received_at is None:
            self._received_at = time.monotonic()

    def listen(self) -> None:
        """Install the signal handlers. A signal exits the process, except within :meth:`held`."""
        handle_signals(self._on_signal)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Only record signals; the code inside checks :attr:`received`."""
        with self._exiting_at_once(False):
            yield

    @contextlib.contextmanager
    def released(self) -> Iterator[None]:
        """Within :meth:`held`: let a signal exit the process, including one already recorded."""
        if self.received:
            raise Stopped
        with self._exiting_at_once(True):
            yield

    @contextlib.contextmanager
    def _exiting_at_once(self, value: bool) -> Iterator[None]:
        before, self._exits_at_once = self._exits_at_once, value
        try:
            yield
        finally:
            self._exits_at_once = before

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.note()
        assert self._received_at is not None
        if time.monotonic() - self._received_at > SAME_SIGNAL_SECONDS:
            os._exit(EXIT_CODE)  # a second signal ends the process unconditionally
        if self._exits_at_once:
            raise Stopped


# One instance, because signals arrive per process.
STOP_REQUEST = StopRequest()


def handle_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    """Install a handler for :data:`SIGNALS`; call it in the main thread."""
    for number in SIGNALS:
        signal.signal(number, handler)


def leave_signals_to_trainer(worker: int) -> None:
    """Shield a loader worker from signals that are meant for the trainer.

    A new session protects it from signals to the whole process group. SIGUSR1 is also ignored, for
    launchers that signal each process.

    Args:
        worker: its number, which PyTorch passes to worker init functions.
    """
    os.setsid()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
