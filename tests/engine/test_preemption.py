"""Signals that ask a process to stop, without a training."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from locreweight.engine import preemption
from locreweight.engine.preemption import Stopped, StopRequest
from tests.engine.tiny_training import restored_loggers_and_signals

SIGNALS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])


@pytest.fixture
def request_(monkeypatch):
    with restored_loggers_and_signals():
        request = StopRequest()
        request.listen()
        yield request


@pytest.fixture
def exits(monkeypatch):
    """Codes with which the process would have left at once."""
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    return codes


def send(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


@SIGNALS
def test_where_nothing_would_be_lost_it_leaves_at_once(request_, number):
    with pytest.raises(Stopped) as stopped:
        send(number)
    assert stopped.value.code == 75


@SIGNALS
def test_where_something_would_it_is_only_noted(request_, number):
    with request_.held():
        assert not request_.received
        send(number)
        assert request_.received


def test_it_leaves_once_nothing_would_be_lost_any_more(request_):
    with request_.held():
        with request_.released():
            pass
        send()
        with pytest.raises(Stopped), request_.released():
            pytest.fail("it had been asked to stop before")


def test_what_is_held_is_held_again_after_a_release(request_):
    with request_.held():
        with pytest.raises(Stopped), request_.released():
            send()
        send()  # is noted only


def test_one_signal_that_comes_several_times_is_one(request_, exits):
    """To the process group, and passed on by a launcher."""
    with request_.held():
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
            send(number)
    assert not exits


def test_a_second_one_ends_the_process(request_, exits, monkeypatch):
    monkeypatch.setattr(preemption, "SAME_SIGNAL_SECONDS", -1.0)
    with request_.held():
        send()
    assert exits == [75]


class Pids(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        return os.getpid()


SCRIPT = """
import os, signal, torch
from locreweight.engine.preemption import STOP_REQUEST, leave_signals_to_trainer
from tests.engine.test_preemption import Pids

STOP_REQUEST.listen()
with STOP_REQUEST.held():
    batches = iter(torch.utils.data.DataLoader(
        Pids(), num_workers=1, prefetch_factor=1, worker_init_fn=leave_signals_to_trainer))
    worker = int(next(batches))
    assert worker != os.getpid()
    os.kill(worker, signal.SIGUSR1)
    assert int(next(batches)) == worker and not STOP_REQUEST.received
    os.killpg(0, signal.SIGUSR1)
    assert int(next(batches)) == worker and STOP_REQUEST.received
    os.killpg(0, signal.SIGTERM)
    assert [int(pid) for pid in batches] == [worker] * 5
print("done")
"""


def test_loader_workers_survive_it(tmp_path):
    """Sent to the whole process group, as terminals and schedulers do; SIGUSR1 also to each."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        start_new_session=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "done\n"
