"""SIGTERM and SIGUSR1: the machine is wanted for something else; ``--resume`` goes on later.

In training the step is finished, all processes agree, and a checkpoint is saved. Wherever nothing
would be lost (while things are set up, in evaluation) the process leaves at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again later
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Schedulers and launchers pass one signal on in several ways: within this time it is the same.
SAME_SIGNAL_SECONDS = 1.0


class Stopped(SystemExit):
    """Ends the process with :data:`EXIT_CODE`."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


class StopRequest:
    """Whether this process was asked to stop; see :data:`STOP`."""

    def __init__(self) -> None:
        self._asked_at: float | None = None
        self._may_leave = True

    @property
    def received(self) -> bool:
        return self._asked_at is not None

    def note(self) -> None:
        """A signal has come."""
        if self._asked_at is None:
            self._asked_at = time.monotonic()

    def listen(self) -> None:
        """From now on; a first signal ends the process unless :meth:`held`."""
        handle_signals(self._on_signal)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """A signal is only noted: whoever asks for :attr:`received` decides."""
        with self._leaving(False):
            yield

    @contextlib.contextmanager
    def released(self) -> Iterator[None]:
        """Within :meth:`held`: a signal ends the process, one that was noted before as well."""
        if self.received:
            raise Stopped
        with self._leaving(True):
            yield

    @contextlib.contextmanager
    def _leaving(self, allowed: bool) -> Iterator[None]:
        before, self._may_leave = self._may_leave, allowed
        try:
            yield
        finally:
            self._may_leave = before

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.note()
        assert self._asked_at is not None
        if time.monotonic() - self._asked_at > SAME_SIGNAL_SECONDS:
            os._exit(EXIT_CODE)  # a second one: at once, whatever is going on
        if self._may_leave:
            raise Stopped


# One for the process, as signals are.
STOP_REQUEST = StopRequest()


def handle_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    """Has :data:`SIGNALS` handled by a function; to be called in the main thread."""
    for number in SIGNALS:
        signal.signal(number, handler)


def leave_signals_to_trainer(worker: int) -> None:
    """For a loader's workers: a signal to the whole process group is the trainer's affair.

    In a session of their own they are not reached by it; where each process is signaled one by
    one, SIGUSR1 at least does not end them.
    """
    os.setsid()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
