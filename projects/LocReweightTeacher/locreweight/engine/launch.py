"""From the command line to the processes of a run, and from how they ended to an exit code."""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from types import FrameType

import torch
from detectron2.engine import default_argument_parser
from detectron2.engine import launch as launch_processes
from detectron2.utils import comm
from torch import distributed
from torch.multiprocessing import (  # type: ignore[attr-defined]
    ProcessExitedException,
    _prctl_pr_set_pdeathsig,
)

from ..errors import UsageError
from .preemption import EXIT_CODE, STOP_REQUEST, Stopped, handle_signals

logger = logging.getLogger(__name__)

Main = Callable[[argparse.Namespace], object]


def argument_parser() -> argparse.ArgumentParser:
    """Detectron2's command line, the method, and how long processes wait for each other."""
    parser = default_argument_parser()
    parser.add_argument(
        "--method",
        default="",
        metavar="FILE",
        help="what one method does otherwise, laid over the config file: one of configs/methods/",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=1800.0,
        metavar="SECONDS",
        help="processes end with an error when one of them has not been heard of for so long; "
        "more than the longest evaluation takes",
    )
    return parser


def launch(main: Main, args: argparse.Namespace) -> None:
    """Run ``main(args)`` in this process, in ``--num-gpus`` new ones, or as one of torchrun's.

    What the user has to put right ends the program with one line and code 1, a stop by SIGTERM or
    SIGUSR1 with :data:`.preemption.EXIT_CODE`.

    Args:
        main: importable by its name from the program's main module.
        args: of :func:`argument_parser`.
    """
    timeout = timedelta(seconds=args.timeout)
    if distributed.is_torchelastic_launched():
        _run(_as_one_of_torchruns, (main, args, timeout))
        return
    try:
        _check_gpus(args.num_gpus)
    except UsageError as error:
        sys.exit(f"error: {error}")
    if args.num_gpus * args.num_machines > 1:
        handle_signals(_pass_on)
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
        # One of several processes: it has said why, unless a signal ended it.
        if STOP_REQUEST.received and error.signal_name:
            raise Stopped from error
        if error.signal_name:
            raise
        sys.exit(error.exit_code)


def check_device(device: str) -> None:
    """Whether the processes of this run can work on it.

    Args:
        device: ``MODEL.DEVICE``.

    Raises:
        UsageError: says what to set instead.
    """
    on_gpu = device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        raise UsageError("there is no GPU here: add MODEL.DEVICE cpu SOLVER.AMP.ENABLED False")
    if comm.get_world_size() == 1:
        return
    if on_gpu and device != "cuda":
        raise UsageError(
            f"MODEL.DEVICE {device} would put all processes on one GPU; with MODEL.DEVICE cuda "
            "each has its own"
        )
    if not on_gpu and distributed.get_backend() == "nccl":
        raise UsageError(
            f"MODEL.DEVICE is {device}, but several processes on a machine with GPUs exchange "
            "gradients over these: set MODEL.DEVICE cuda, or hide the GPUs with "
            "CUDA_VISIBLE_DEVICES=''"
        )


def _check_gpus(processes: int) -> None:
    there = torch.cuda.device_count()
    if 0 < there < processes:
        raise UsageError(
            f"{processes} processes need as many GPUs on a machine, and there are {there}: "
            f"--num-gpus {there}, or CUDA_VISIBLE_DEVICES='' for none"
        )


def _run(main: Callable[..., object], arguments: tuple) -> None:
    """One process of the run."""
    STOP_REQUEST.listen()
    try:
        main(*arguments)
    except UsageError as error:
        # From a loader's worker the message comes with its traceback, of which it is the end.
        last_line = str(error).strip().splitlines()[-1]
        sys.exit("error: " + last_line.removeprefix("locreweight.data.image_io.UnreadableImage: "))
    except Stopped:
        logger.warning("stopped by a signal, exit code %d: go on with --resume", EXIT_CODE)
        raise
    except Exception as error:
        if not STOP_REQUEST.received:
            raise
        # The same signal has ended what this process depends on: a worker, another process.
        logger.warning("stopped by a signal, before anything could be saved: %s", error)
        raise Stopped from error


def _as_one_of_torchruns(main: Main, args: argparse.Namespace, timeout: timedelta) -> None:
    if args.num_gpus != 1:
        raise UsageError("torchrun decides on the number of processes: leave out --num-gpus")
    # Should torchrun be killed its processes would train on, beside those that it starts anew.
    _prctl_pr_set_pdeathsig(signal.SIGKILL)
    _check_gpus(int(os.environ["LOCAL_WORLD_SIZE"]))
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=timeout)
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    main(args)
    distributed.destroy_process_group()


def _pass_on(number: int, frame: FrameType | None) -> None:
    """What the process that started the others does with a signal; then it goes on waiting."""
    STOP_REQUEST.note()
    for process in multiprocessing.active_children():
        assert process.pid is not None
        os.kill(process.pid, number)
