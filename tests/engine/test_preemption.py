"""Signals that ask a process to stop."""

import multiprocessing
import os
import signal

import pytest
import torch

from locreweight.engine import preemption
from locreweight.engine.preemption import (
    STOP_REQUEST,
    Stopped,
    StopRequest,
    leave_signals_to_trainer,
)
from tests.engine.tiny_training import restored_loggers_and_signals

SIGNALS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])


@pytest.fixture
def stop_request():
    with restored_loggers_and_signals():
        request = StopRequest()
        request.listen()
        yield request


@pytest.fixture
def exits(monkeypatch):
    """Exit codes of ``os._exit``, which does nothing here."""
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    return codes


def send(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


@SIGNALS
def test_signal_exits_at_once(stop_request, number):
    with pytest.raises(Stopped) as stopped:
        send(number)
    assert stopped.value.code == 75


@SIGNALS
def test_signal_is_only_noted_while_held(stop_request, number):
    with stop_request.held():
        assert not stop_request.received
        send(number)
        assert stop_request.received


def test_noted_signal_exits_when_released(stop_request):
    with stop_request.held():
        with stop_request.released():
            pass
        send()
        with pytest.raises(Stopped), stop_request.released():
            pytest.fail("the signal was noted before")


def test_signals_are_held_again_after_a_release(stop_request):
    with stop_request.held():
        with pytest.raises(Stopped), stop_request.released():
            send()
        send()  # only noted


def test_repeated_signals_count_as_one(stop_request, exits):
    """Sent to the process group, and forwarded by a launcher."""
    with stop_request.held():
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
            send(number)
    assert not exits


def test_second_signal_ends_the_process(stop_request, exits, monkeypatch):
    monkeypatch.setattr(preemption, "SAME_SIGNAL_SECONDS", -1.0)
    with stop_request.held():
        send()
    assert exits == [75]


class Pids(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        return os.getpid()


def signal_workers():
    """Signal a loader worker and the process group, and read all batches."""
    os.setsid()
    STOP_REQUEST.listen()
    with STOP_REQUEST.held():
        loader = torch.utils.data.DataLoader(
            Pids(), num_workers=1, prefetch_factor=1, worker_init_fn=leave_signals_to_trainer
        )
        batches = iter(loader)
        worker = int(next(batches))
        assert worker != os.getpid()
        os.kill(worker, signal.SIGUSR1)
        assert int(next(batches)) == worker and not STOP_REQUEST.received
        os.killpg(0, signal.SIGUSR1)
        assert int(next(batches)) == worker and STOP_REQUEST.received
        os.killpg(0, signal.SIGTERM)
        assert [int(pid) for pid in batches] == [worker] * 5


def test_loader_workers_survive_signals():
    """Signals to the process group, as from terminals and schedulers, and SIGUSR1 to a worker."""
    process = multiprocessing.get_context("fork").Process(target=signal_workers)
    process.start()
    process.join(60)
    assert process.exitcode == 0
