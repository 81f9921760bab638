"""Run several trainings, each in its own process and on its own GPUs.

A run that was stopped resumes from its last checkpoint. Duration, exit code and memory of each
attempt are written to ``attempts.json`` in the run's output folder.
"""

from __future__ import annotations

import json
import math
import os
import queue
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock

import torch
import yaml
from detectron2.config import CfgNode

from ..config import load_config
from ..config_scaling import scale_to_world_size
from ..errors import UsageError
from ..file_io import atomic_write_bytes
from .run_folder import ATTEMPTS_FILE, Attempt, RunFolder, flatten_config, read_attempts

REPOSITORY = Path(__file__).resolve().parents[4]
CONSOLE_FILE = "console.txt"  # in OUTPUT_DIR: output of the training process
_POLL_SECONDS = 2.0


@dataclass(frozen=True)
class Run:
    """One training run of a comparison.

    Attributes:
        config: config file.
        method: config file of the method, merged into ``config``; None for the config's own method.
        seed: seed of the initial weights, of all random draws, and of the split into labeled and
            unlabeled images.
        output: ``OUTPUT_DIR``.
        options: ``KEY VALUE`` pairs that override both files.
        num_gpus: number of processes that train together.
    """

    config: Path
    method: Path | None
    seed: int
    output: Path
    options: tuple[str, ...] = ()
    num_gpus: int = 1

    @property
    def row(self) -> str:
        """Row in the table of results. Runs of one row differ in their seed only."""
        return self.config.stem + (f" + {self.method.stem}" if self.method else "")

    @property
    def name(self) -> str:
        return f"{self.row}, seed {self.seed}"

    @property
    def all_options(self) -> list[str]:
        """``KEY VALUE`` pairs of the command line."""
        seed = str(self.seed)
        seeds = ["SEED", seed, "DATASETS.SPLIT_SEED", seed]
        return [*seeds, *self.options, "OUTPUT_DIR", str(self.output)]

    @cached_property
    def cfg(self) -> CfgNode:
        """The effective config.

        Raises:
            UsageError: for an invalid file or option.
        """
        cfg = load_config(str(self.config), self.all_options, str(self.method or ""))
        return scale_to_world_size(cfg, self.num_gpus)

    @property
    def command(self) -> list[str]:
        """Arguments for Python that start or resume the training, as a user would give them."""
        method = ["--method", str(self.method)] if self.method else []
        # Runs on the same machine need different ports.
        port = ["--dist-url", "auto"] if self.num_gpus > 1 else []
        return [
            *(str(REPOSITORY / "train_net.py"), "--config-file", str(self.config), *method),
            *("--resume", "--num-gpus", str(self.num_gpus), *port, *self.all_options),
        ]

    @property
    def folder(self) -> RunFolder:
        """The current content of the output folder."""
        return RunFolder(self.output)

    @property
    def iterations_done(self) -> int:
        return min(self.folder.iterations_done, self.cfg.SOLVER.MAX_ITER)

    @property
    def is_finished(self) -> bool:
        """Whether the run was trained and evaluated to the end."""
        is_trained = (self.output / "model_final.pth").is_file()
        return is_trained and self.cfg.SOLVER.MAX_ITER in self.folder.evaluations

    @property
    def final_ap(self) -> float:
        """AP of the final teacher of a finished run, in percent."""
        ap = self.folder.evaluations[self.cfg.SOLVER.MAX_ITER]["bbox/AP"]
        return 0.0 if math.isnan(ap) else ap  # Detectron2 writes NaN without detections

    def changed_settings(self) -> list[str]:
        """Describe each key whose value differs from the one that this run was started with."""
        before = self.folder.config  # empty if the first start was killed before it wrote the file
        now = flatten_config(yaml.safe_load(self.cfg.dump()))
        # Keys that only one of the two has were added or removed by a version of the project.
        return [
            f"{key} was {before[key]!r}, now {now[key]!r}"
            for key in sorted(before.keys() & now.keys())
            if before[key] != now[key]
        ]


class RunQueue:
    """Run trainings one after another in each of several slots."""

    def __init__(
        self,
        runs: list[Run],
        slots: list[str | None],
        must_wait: Callable[[Run, Collection[Run]], bool] = lambda run, active: False,
        prepare: Callable[[Run], None] = lambda run: None,
    ) -> None:
        """
        Args:
            runs: in the order in which they are started.
            slots: as returned by :func:`gpu_slots`. One run at a time uses a slot; its processes
                get the slot's value as ``CUDA_VISIBLE_DEVICES``, None leaves it unchanged.
            must_wait: whether a run has to wait, given the runs that are active. The runs after it
                are started first.
            prepare: called before a run is started.

        Raises:
            UsageError: if two runs have the same output folder.
        """
        for folder, count in Counter(run.output for run in runs).items():
            if count > 1:
                raise UsageError(
                    f"{count} runs have the output folder {folder}: use another folder for each"
                )
        self._waiting = list(runs)
        self._active: set[Run] = set()  # from before they are started
        self._must_wait, self._prepare = must_wait, prepare
        self._slots = slots
        self._ended: queue.SimpleQueue[tuple[Run, Attempt]] = queue.SimpleQueue()
        self._processes: dict[Run, subprocess.Popen] = {}
        self._lock = Lock()
        self._stopping = False

    @property
    def running(self) -> list[Run]:
        with self._lock:
            return list(self._processes)

    def work(self, on_run_end: Callable[[Run, Attempt], None], on_poll: Callable[[], None]) -> None:
        """Start all runs and wait for them.

        Args:
            on_run_end: called after each run that ended without being asked to stop.
            on_poll: called every few seconds.

        Raises:
            KeyboardInterrupt: after an interrupt, when all running processes have saved a
                checkpoint and ended. A second interrupt kills them.
        """
        with ThreadPoolExecutor(len(self._slots)) as threads:
            workers = {threads.submit(self._work_in_slot, slot) for slot in self._slots}
            try:
                while wait(workers, timeout=_POLL_SECONDS).not_done:
                    self._report_ended(on_run_end)
                    on_poll()
            except BaseException:
                self._stop(subprocess.Popen.terminate)
                raise
            finally:
                self._wait_for(workers)
                self._report_ended(on_run_end)
        for worker in workers:
            worker.result()  # re-raises an exception of the thread

    def _report_ended(self, on_run_end: Callable[[Run, Attempt], None]) -> None:
        while not self._ended.empty():
            on_run_end(*self._ended.get())

    def _wait_for(self, workers: set[Future]) -> None:
        try:
            wait(workers)
        except KeyboardInterrupt:  # the second one
            self._stop(subprocess.Popen.kill)
            wait(workers)

    def _work_in_slot(self, slot: str | None) -> None:
        while self._waiting and not self._stopping:
            run = self._next_run()
            if run is None:
                time.sleep(_POLL_SECONDS)
                continue
            try:
                self._prepare(run)
                attempt = self._run_process(run, slot)
            finally:
                with self._lock:
                    self._active.discard(run)
            if attempt is not None and not self._stopping:
                self._ended.put((run, attempt))

    def _next_run(self) -> Run | None:
        with self._lock:
            for run in self._waiting:
                if not self._must_wait(run, self._active):
                    self._waiting.remove(run)
                    self._active.add(run)
                    return run
        return None

    def _run_process(self, run: Run, slot: str | None) -> Attempt | None:
        run.output.mkdir(parents=True, exist_ok=True)
        environment = os.environ | ({} if slot is None else {"CUDA_VISIBLE_DEVICES": slot})
        start = time.monotonic()
        with (run.output / CONSOLE_FILE).open("ab") as console:
            with self._lock:
                if self._stopping:
                    return None
                process = subprocess.Popen(
                    [sys.executable, *run.command],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=console,
                    stderr=subprocess.STDOUT,
                    # Ctrl-C must reach only this process, which then asks the runs to stop.
                    start_new_session=True,
                )
                self._processes[run] = process
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        with self._lock:
            del self._processes[run]
        attempt = Attempt(
            seconds=round(time.monotonic() - start, 1),
            exit_code=process.returncode,
            peak_ram_mib=round(usage.ru_maxrss / 1024, 1),
        )
        records = [asdict(each) for each in [*read_attempts(run.output), attempt]]
        atomic_write_bytes(run.output / ATTEMPTS_FILE, json.dumps(records, indent=1).encode())
        return attempt

    def _stop(self, send_signal: Callable[[subprocess.Popen], None]) -> None:
        with self._lock:
            self._stopping = True
            for process in self._processes.values():
                send_signal(process)


def gpu_slots(
    num_gpus: int, parallel: int | None, on_gpus: bool, runs_per_gpu: int = 1
) -> list[str | None]:
    """Divide the visible GPUs among runs that train at the same time.

    Args:
        num_gpus: number of GPUs per run.
        parallel: number of runs at a time; None for as many as the GPUs allow, or 1 without GPUs.
        on_gpus: whether the runs use GPUs.
        runs_per_gpu: number of runs that use a GPU at the same time.

    Returns:
        a value of ``CUDA_VISIBLE_DEVICES`` for each run at a time; None to leave it unchanged.

    Raises:
        UsageError: if there are too few GPUs.
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
    groups *= runs_per_gpu
    if len(groups) < (parallel or 1):
        raise UsageError(
            f"{parallel or 1} run(s) at a time need {parallel or 1} x {num_gpus} GPUs, but "
            f"{len(gpus)} are visible: reduce --parallel or --num-gpus, or train with "
            "MODEL.DEVICE cpu"
        )
    return list(groups[: parallel or len(groups)])
