"""Start of processes."""

import atexit
import os
import subprocess
import sys
from socket import gethostname

import pytest
import torch
from torch import distributed
from torch.multiprocessing import ProcessRaisedException

from locreweight.engine import argument_parser, launch
from locreweight.engine.preemption import EXIT_CODE, Stopped
from locreweight.errors import UsageError
from tests.engine.tiny_training import restored_loggers_and_signals


def test_launch_rejects_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SystemExit, match="error: 3 processes.*there are 2: use --num-gpus 2"):
        launch(print, argument_parser().parse_args(["--num-gpus", "3"]))


@pytest.mark.parametrize(
    ("gpus", "options", "words"),
    [
        (1, [], "2 processes.*there are 1"),
        (2, ["--num-machines", "3"], r"torchrun starts 2 machine\(s\) instead of --num-machines 3"),
        (2, ["--num-gpus", "2"], "torchrun sets the number of processes: remove --num-gpus"),
    ],
)
def test_launch_rejects_what_torchrun_has_not_started(monkeypatch, gpus, options, words):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(distributed, "is_torchelastic_launched", lambda: True)
    # The function `launch` of the package hides the module.
    module = sys.modules["locreweight.engine.launch"]
    monkeypatch.setattr(module, "_prctl_pr_set_pdeathsig", lambda _: None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with restored_loggers_and_signals(), pytest.raises(SystemExit, match=f"error: {words}"):
        launch(print, argument_parser().parse_args(options))


GLOO = "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/"


def raises(error):
    def main(args):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            RuntimeError(
                f"{GLOO}pair.cc:545] Read error [10.0.0.2]:59: Connection reset. Check it."
            ),
            r"lost another process \(Read error \[10.0.0.2\]:59: Connection reset\)\. If that",
        ),
        (
            RuntimeError(f"{GLOO}unbound_buffer.cc:78] Timed out waiting 20000ms for recv"),
            r"lost another process \(Timed out waiting 20000ms for recv\)",
        ),
        (
            distributed.DistBackendError("NCCL error in: x.cpp:1, remote process exited"),
            r"lost another process \(NCCL error in: x.cpp:1, remote process exited\)",
        ),
        (
            distributed.DistBackendError(
                "NCCL error in: x.cpp:1, remote process exited\nncclRemoteError: A call failed"
            ),
            r"lost another process \(NCCL error in: x.cpp:1, remote process exited\)",
        ),
        (
            distributed.DistStoreError("Timed out after 21 seconds waiting for clients."),
            r"cannot connect to the other processes \(Timed out after 21 seconds waiting",
        ),
        (
            ProcessRaisedException(
                "\n\n-- Process 0 terminated with the following error:\nTraceback (most recent "
                f"call last):\n  File\nRuntimeError: Gloo connectFullMesh failed with {GLOO}pair.cc"
                ":152] timed out connecting: SO_ERROR: Connection refused, remote=[127.0.0.1]:91\n",
                0,
                123,
            ),
            r"cannot connect to the other processes \(Gloo connectFullMesh failed with timed out",
        ),
    ],
)
def test_connection_error_is_one_line(error, words):
    expected = pytest.raises(SystemExit, match=rf"^error: process 0 on {gethostname()}: {words}")
    with restored_loggers_and_signals(), expected as raised:
        launch(raises(error), argument_parser().parse_args([]))
    assert "\n" not in raised.value.code


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        # Of a process that failed while it used a group.
        ProcessRaisedException(
            "Traceback:\n  group = _get_global_gloo_group()\nPicklingError: cannot pickle x\n", 0, 1
        ),
    ],
)
def test_other_errors_keep_their_traceback(error):
    with restored_loggers_and_signals(), pytest.raises(type(error)) as raised:
        launch(raises(error), argument_parser().parse_args([]))
    assert raised.value is error


class Exited(BaseException):
    """Raised by ``os._exit``, which would end the tests."""


def succeeds(args):
    pass


@pytest.mark.parametrize(
    ("main", "code", "words"),
    [
        (succeeds, 0, ""),
        (raises(Stopped()), EXIT_CODE, ""),
        (raises(UsageError("no images")), 1, "error: no images"),
        (raises(RuntimeError(f"{GLOO}pair.cc:545] Read error")), 1, "error: process 0 on"),
    ],
)
def test_process_of_a_group_exits_without_teardown(monkeypatch, capsys, main, code, words):
    def end(code):
        raise Exited(code)

    monkeypatch.setattr(os, "_exit", end)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        with restored_loggers_and_signals(), pytest.raises(Exited, match=f"^{code}$"):
            launch(main, argument_parser().parse_args([]))
    finally:
        distributed.destroy_process_group()
    assert capsys.readouterr().err.startswith(words)


def register_teardown(args):
    atexit.register(print, "teardown")
    print("finished")


@pytest.mark.slow
def test_process_of_torchrun_exits_without_teardown(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from locreweight.engine import argument_parser, launch\n"
        "from tests.engine.test_launch import register_teardown\n"
        "launch(register_teardown, argument_parser().parse_args([]))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", str(script)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "finished\n"), done.stderr
