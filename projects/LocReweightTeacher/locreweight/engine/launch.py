"""Command line of training, start of its processes, and exit codes."""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import re
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.util import _run_finalizers  # type: ignore[attr-defined]
from types import FrameType
from typing import NoReturn

import torch
from detectron2.engine import default_argument_parser
from detectron2.engine import launch as launch_processes
from detectron2.utils import comm
from torch import distributed
from torch.multiprocessing import (  # type: ignore[attr-defined]
    ProcessExitedException,
    ProcessRaisedException,
    _prctl_pr_set_pdeathsig,
)

from ..command_line import ConfigArgumentParser
from ..errors import UsageError
from .agreement import describe_process
from .preemption import EXIT_CODE, STOP_REQUEST, Stopped, handle_signals

logger = logging.getLogger(__name__)

# The message of a ProcessRaisedException is a whole traceback.
_ERROR_LINE = re.compile(r"^[\w.]+Error: .*", re.MULTILINE)
# Gloo raises RuntimeError for all of its errors.
_CONNECTION_ERROR = re.compile(r"[Gg]loo|NCCL|torch\.distributed\.Dist\w*Error")
_AT_START = re.compile(r"connectFullMesh|Dist(Store|Network)Error")
_TYPE_OR_SOURCE = re.compile(r"^[\w.]+Error: |\[/\S+\] ?")

Main = Callable[[argparse.Namespace], object]


def argument_parser() -> argparse.ArgumentParser:
    """Detectron2's command line plus the flags of this project."""
    detectron2_parser = default_argument_parser()
    # Its positional argument takes everything from the first KEY on, flags included.
    actions = [action for action in detectron2_parser._actions if action.option_strings]
    detectron2_parser._actions = actions
    parser = ConfigArgumentParser(
        parents=[detectron2_parser],
        add_help=False,  # is one of Detectron2's flags
        epilog=detectron2_parser.epilog,
    )
    parser.add_argument(
        "--method",
        default="",
        metavar="NAME",
        help="method whose config is merged into the config file: a file of configs/methods/ "
        "without its ending, such as soft_teacher or ablation/ler, or the path of another file",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="start a new run although OUTPUT_DIR holds one: that folder is renamed to the first "
        "free name of OUTPUT_DIR-old-1, -old-2, ...",
    )
    parser.add_argument(
        "--verbose", action="store_true", help="print the whole log, which is also in OUTPUT_DIR"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=1800.0,
        metavar="SECONDS",
        help="processes end with an error after waiting this long for another process; it must be "
        "longer than the longest evaluation",
    )
    return parser


def launch(main: Main, args: argparse.Namespace) -> None:
    """Run ``main(args)`` in this process, in ``--num-gpus`` new processes, or under torchrun.

    A :class:`UsageError` exits with its message and code 1. A stop by SIGTERM or SIGUSR1 exits with
    :data:`.preemption.EXIT_CODE`. Under torchrun, the process also ends when ``main`` returns: code
    after this call does not run.

    Args:
        main: a function that can be imported by its name, for the new processes.
        args: from :func:`argument_parser`.
    """
    timeout = timedelta(seconds=args.timeout)
    if distributed.is_torchelastic_launched():
        _run(_run_under_torchrun, (main, args, timeout))
        return
    try:
        _check_gpus(args.num_gpus)
    except UsageError as error:
        sys.exit(f"error: {error}")
    if args.num_gpus * args.num_machines > 1:
        handle_signals(_forward_signal)
    try:
        launch_processes(
            _run,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(main, (args,)),
            timeout=timeout,
        )
    except ProcessExitedException as error:
        # The process has printed its error, unless a signal ended it.
        if STOP_REQUEST.received and error.signal_name:
            raise Stopped from error
        if error.signal_name:
            raise
        sys.exit(error.exit_code)
    except ProcessRaisedException as error:
        if problem := _connection_problem(error):
            sys.exit(f"error: machine {args.machine_rank} on {socket.gethostname()}: {problem}")
        raise


def _connection_problem(error: Exception) -> str:
    """What an error of PyTorch's communication means; empty for any other error."""
    # NCCL's messages have a second line, such as "ncclRemoteError: ...".
    lines = _ERROR_LINE.findall("".join(traceback.format_exception_only(error)))
    lines = [line for line in lines if not line.startswith("nccl")]
    if not (lines and _CONNECTION_ERROR.search(lines[-1])) or "invalid usage" in lines[-1]:
        return ""
    reason = _TYPE_OR_SOURCE.sub("", lines[-1]).split(". ")[0]
    if _AT_START.search(lines[-1]):
        return (
            f"cannot connect to the other processes ({reason}). Check that all hosts were started "
            "within --timeout, that they can reach the address and port of the first one, and "
            "GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME, see docs/several_machines.md"
        )
    return (
        f"lost another process ({reason}). If that process ended by an error, it has printed it; "
        "if not, its host or the network failed, or it took longer than --timeout. Continue with "
        "--resume"
    )


def _check_gpus(processes: int) -> None:
    gpus = torch.cuda.device_count()
    if 0 < gpus < processes:
        raise UsageError(
            f"{processes} processes on one machine need {processes} GPUs, and there are {gpus}: "
            f"use --num-gpus {gpus}, or CUDA_VISIBLE_DEVICES='' to train on the CPU"
        )


def _run(main: Callable[..., object], arguments: tuple) -> None:
    """Run one process and turn its errors into exit codes."""
    STOP_REQUEST.listen()
    try:
        main(*arguments)
    except UsageError as error:
        message = str(error).strip()
        if "DataLoader worker" in message:  # the message is the last line of a traceback
            message = message.splitlines()[-1]
        _exit("error: " + message.removeprefix("locreweight.data.image_io.UnreadableImage: "))
    except Stopped:
        logger.warning("stopped by a signal, exit code %d: continue with --resume", EXIT_CODE)
        _end_process(EXIT_CODE)
        raise
    except Exception as error:
        if not STOP_REQUEST.received:
            if problem := _connection_problem(error):
                _exit(f"error: {describe_process()}: {problem}")
            raise
        # The signal has also ended a worker or another process that this one depends on.
        logger.warning("stopped by a signal before a checkpoint could be saved: %s", error)
        raise Stopped from error
    _end_process(0)


def _exit(message: str) -> NoReturn:
    """Print a message and exit with code 1."""
    if distributed.is_initialized():
        print(message, file=sys.stderr)
        _end_process(1)
    sys.exit(message)


def _end_process(code: int) -> None:
    """Exit at once if this process communicates with others; otherwise do nothing.

    At a normal exit, PyTorch can abort the process: a thread of Gloo may not have released the
    tensors of the last exchange yet, and needs the Python interpreter for it.
    """
    if not distributed.is_initialized():
        return
    # Semaphores that are left behind, such as that of the progress bar, would cause a warning.
    _run_finalizers(0)
    sys.stdout.flush()
    sys.stderr.flush()
    logging.shutdown()
    os._exit(code)


def _run_under_torchrun(main: Main, args: argparse.Namespace, timeout: timedelta) -> None:
    if args.num_gpus != 1:
        raise UsageError("torchrun sets the number of processes: remove --num-gpus")
    if (machines := int(os.environ["GROUP_WORLD_SIZE"])) < args.num_machines:
        raise UsageError(
            f"torchrun starts {machines} machine(s) instead of --num-machines {args.num_machines}: "
            "it treats a machine as lost if its clock is off by more than 15 seconds. Synchronize "
            "the clocks, or remove --num-machines to train with fewer"
        )
    # End with torchrun: otherwise this process would survive a kill of torchrun and train beside
    # the restarted run.
    _prctl_pr_set_pdeathsig(signal.SIGKILL)
    _check_gpus(int(os.environ["LOCAL_WORLD_SIZE"]))
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if has_gpu else "gloo", timeout=timeout)
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    main(args)


def _forward_signal(number: int, frame: FrameType | None) -> None:
    """Pass a signal to the child processes, and keep waiting for them."""
    STOP_REQUEST.note()
    for process in multiprocessing.active_children():
        assert process.pid is not None
        os.kill(process.pid, number)
