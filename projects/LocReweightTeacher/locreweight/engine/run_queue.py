"""Trainings as processes of their own: several at a time, each on GPUs of its own.

A run that was stopped goes on where it was; what each attempt needed is noted beside its results,
in whose ``run.json`` the training itself says of which commit and on which machine it was.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from threading import Lock

import torch
from detectron2.config import CfgNode

from ..config import load_config, scale_to_world_size
from ..file_io import atomic_write_bytes

ROOT = Path(__file__).resolve().parents[4]
ATTEMPTS = "attempts.json"  # in OUTPUT_DIR
CONSOLE = "console.txt"
_POLL_SECONDS = 2.0


@dataclass(frozen=True)
class Run:
    """One training of a comparison.

    Attributes:
        config: file.
        method: file that is laid over it, or None.
        seed: of weights, order and draws, and of the split into labeled and unlabeled images.
        output: ``OUTPUT_DIR``.
        options: ``KEY VALUE`` pairs, which go over all else.
        num_gpus: processes that train together.
    """

    config: Path
    method: Path | None
    seed: int
    output: Path
    options: tuple[str, ...] = ()
    num_gpus: int = 1

    @property
    def row(self) -> str:
        """Runs that differ in nothing but their seed are of the same row."""
        return self.config.stem + (f" + {self.method.stem}" if self.method else "")

    @property
    def name(self) -> str:
        return f"{self.row}, seed {self.seed}"

    @property
    def all_options(self) -> list[str]:
        seed = str(self.seed)
        seeds = ["SEED", seed, "DATASETS.SPLIT_SEED", seed]
        return [*seeds, *self.options, "OUTPUT_DIR", str(self.output)]

    @cached_property
    def cfg(self) -> CfgNode:
        """The effective config.

        Raises:
            UsageError: for anything in the files or options that cannot be.
        """
        cfg = load_config(str(self.config), self.all_options, str(self.method or ""))
        return scale_to_world_size(cfg, self.num_gpus)

    @property
    def command(self) -> list[str]:
        """As a user would write it; finished runs, too, can be called with it again."""
        method = ["--method", str(self.method)] if self.method else []
        # Runs side by side on one machine must not meet at the same port.
        port = ["--dist-url", "auto"] if self.num_gpus > 1 else []
        return [
            *(str(ROOT / "train_net.py"), "--config-file", str(self.config), *method, "--resume"),
            *("--num-gpus", str(self.num_gpus), *port, *self.all_options),
        ]


@dataclass(frozen=True)
class Attempt:
    """One start of a run.

    Attributes:
        seconds: that it took.
        exit_code: of the process, 0 for success.
        peak_ram_mib: the largest resident memory of one of its processes.
    """

    seconds: float
    exit_code: int
    peak_ram_mib: float


def read_attempts(output: Path) -> list[Attempt]:
    """All attempts at a run, the first one first."""
    file = output / ATTEMPTS
    records = json.loads(file.read_text()) if file.is_file() else []
    known = {field.name for field in fields(Attempt)}  # earlier versions wrote more
    return [Attempt(**{k: v for k, v in each.items() if k in known}) for each in records]


class RunQueue:
    """Runs that wait, and those that are running; :meth:`work` does them all."""

    def __init__(self, runs: list[Run], places: list[str | None]) -> None:
        """
        Args:
            runs: in order.
            places: as many runs as these go on at a time, each with its ``CUDA_VISIBLE_DEVICES``;
                None leaves that variable as it is.
        """
        self._waiting: queue.SimpleQueue[Run] = queue.SimpleQueue()
        for run in runs:
            self._waiting.put(run)
        self._places = places
        self._ended: queue.SimpleQueue[tuple[Run, Attempt]] = queue.SimpleQueue()
        self._running: dict[Run, subprocess.Popen] = {}
        self._lock = Lock()
        self._stopping = False

    @property
    def running(self) -> list[Run]:
        with self._lock:
            return list(self._running)

    def work(self, on_end: Callable[[Run, Attempt], None], on_poll: Callable[[], None]) -> None:
        """Does all runs.

        Args:
            on_end: called after each that was not asked to stop.
            on_poll: called now and then.

        Raises:
            KeyboardInterrupt: when interrupted, after the running ones were asked to stop and did;
                interrupted once more, they are ended at once.
        """
        with ThreadPoolExecutor(len(self._places)) as threads:
            workers = {threads.submit(self._work_at, place) for place in self._places}
            try:
                while wait(workers, timeout=_POLL_SECONDS).not_done:
                    self._tell(on_end)
                    on_poll()
            except BaseException:
                self._stop(subprocess.Popen.terminate)
                raise
            finally:
                self._wait_for(workers)
                self._tell(on_end)
        for worker in workers:
            worker.result()  # raises what went wrong in it

    def _tell(self, on_end: Callable[[Run, Attempt], None]) -> None:
        while not self._ended.empty():
            on_end(*self._ended.get())

    def _wait_for(self, workers: set) -> None:
        try:
            wait(workers)
        except KeyboardInterrupt:  # again: no patience
            self._stop(subprocess.Popen.kill)
            wait(workers)

    def _work_at(self, place: str | None) -> None:
        while not self._stopping:
            try:
                run = self._waiting.get_nowait()
            except queue.Empty:
                return
            attempt = self._do(run, place)
            if attempt is not None and not self._stopping:
                self._ended.put((run, attempt))

    def _do(self, run: Run, place: str | None) -> Attempt | None:
        run.output.mkdir(parents=True, exist_ok=True)
        environment = os.environ | ({} if place is None else {"CUDA_VISIBLE_DEVICES": place})
        start = time.monotonic()
        with (run.output / CONSOLE).open("ab") as console:
            with self._lock:
                if self._stopping:
                    return None
                process = subprocess.Popen(
                    [sys.executable, *run.command],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=console,
                    stderr=subprocess.STDOUT,
                    # Ctrl-C is for this program, which passes it on as a request to stop.
                    start_new_session=True,
                )
                self._running[run] = process
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        with self._lock:
            del self._running[run]
        attempt = Attempt(
            seconds=round(time.monotonic() - start, 1),
            exit_code=process.returncode,
            peak_ram_mib=round(usage.ru_maxrss / 1024, 1),
        )
        records = [asdict(each) for each in [*read_attempts(run.output), attempt]]
        text = json.dumps(records, indent=1)
        atomic_write_bytes(run.output / ATTEMPTS, text.encode())
        return attempt

    def _stop(self, how: Callable[[subprocess.Popen], None]) -> None:
        with self._lock:
            self._stopping = True
            for process in self._running.values():
                how(process)


def gpu_slots(num_gpus: int, parallel: int | None, on_gpus: bool) -> list[str | None]:
    """Where runs can go on side by side.

    Args:
        num_gpus: of each run.
        parallel: how many at a time; None for as many as the GPUs allow, or 1 without GPUs.
        on_gpus: whether the runs use GPUs.

    Returns:
        one ``CUDA_VISIBLE_DEVICES`` for each; None to leave the variable as it is.

    Raises:
        ValueError: if there are fewer GPUs than asked for.
    """
    if not on_gpus:
        return [None] * (parallel or 1)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [*map(str, range(torch.cuda.device_count()))]
    if visible is not None:
        gpus = [gpu for gpu in visible.split(",") if gpu]
    groups = [
        ",".join(gpus[i : i + num_gpus]) for i in range(0, len(gpus) - num_gpus + 1, num_gpus)
    ]
    if len(groups) < (parallel or 1):
        raise ValueError(f"{parallel or 1} x {num_gpus} GPUs are asked for, there are {len(gpus)}")
    return list(groups[: parallel or len(groups)])
