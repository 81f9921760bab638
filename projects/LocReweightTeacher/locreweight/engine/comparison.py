"""Plan, check and run the training runs of a comparison: each config, method and seed combined."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean

from detectron2.config import CfgNode
from tqdm import tqdm

from ..config import find_method_file, load_config
from ..config_checks import check_supported
from ..data.datasets.splits import check_split_exists
from ..data.transforms.policies import build_augmentation_policy
from ..errors import UsageError
from ..methods import build_method
from .console import LOG_FILE
from .progress import LINE_SECONDS
from .remaining_time import format_duration
from .run_folder import Attempt, flatten_config
from .run_queue import CONSOLE_FILE, Run, RunQueue, gpu_slots
from .shared_burn_in import SharedBurnIn

_BAR = "{desc}: {percentage:3.0f}%|{bar:24}| {n_fmt}/{total_fmt} iterations [{elapsed}{postfix}]"


def plan_runs(
    configs: Sequence[Path],
    methods: Sequence[str],
    seeds: Sequence[int],
    output: Path,
    options: Sequence[str] = (),
    num_gpus: int = 1,
) -> list[Run]:
    """Return the runs of a comparison, after checking all of them.

    Args:
        configs: config files.
        methods: names or files, as for :func:`~locreweight.config.find_method_file`; if empty, each
            config's own method is used.
        seeds: each config and method is trained once with each seed.
        output: parent folder of all ``OUTPUT_DIR``.
        options: ``KEY VALUE`` pairs for all runs.
        num_gpus: number of GPUs per run.

    Raises:
        UsageError: if a run is invalid, was started before with other settings, or is not
            comparable with the others.
    """
    for config in configs:
        if not config.is_file():
            raise UsageError(
                f"config file {str(config)!r} does not exist. If it is a KEY or VALUE, put another "
                "argument, such as --output, between --config-file and the options"
            )
    method_files = [find_method_file(method) for method in methods]
    rows: list[Path | None] = [*method_files] or [None]
    runs = [
        Run(
            config=config,
            method=method,
            seed=seed,
            output=output
            / "-".join(file.stem for file in (config, method) if file)
            / f"seed-{seed}",
            options=tuple(options),
            num_gpus=num_gpus,
        )
        for seed in dict.fromkeys(seeds)
        for config in configs
        for method in rows
    ]
    if len({run.output for run in runs}) < len(runs):
        raise UsageError("two config files or methods have the same name: rename one of them")
    check_not_set(options, {"SEED": "--seeds", "OUTPUT_DIR": "--output"})
    _check_options(configs, method_files, options[::2])
    for run in runs:
        check_run(run)
    return runs


def run_all(
    runs: list[Run],
    parallel: int | None,
    write_report: Callable[[], None],
    *,
    share_burn_in: bool = False,
    runs_per_gpu: int = 1,
) -> list[str]:
    """Run what is not finished, with progress on the console.

    Args:
        runs: as returned by :func:`plan_runs`.
        parallel: number of runs at a time; None for as many as the GPUs allow, or 1 without GPUs.
        write_report: called after each run and at the end.
        share_burn_in: train the burn-in that several runs have in common only once.
        runs_per_gpu: number of runs that use a GPU at the same time.

    Returns:
        a description of each failed run.

    Raises:
        UsageError: if there are too few GPUs, the output folder cannot be created, or a shared
            burn-in would not be saved.
        KeyboardInterrupt: as :meth:`RunQueue.work`.
    """
    on_gpus = runs[0].cfg.MODEL.DEVICE.startswith("cuda")
    slots = gpu_slots(runs[0].num_gpus, parallel, on_gpus, runs_per_gpu)
    output = runs[0].output.parent.parent
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot create the folder of --output: {error}") from error
    unfinished = [run for run in runs if not run.is_finished]
    if share_burn_in:
        shared = SharedBurnIn(runs, output / "burn-in")
        queue = RunQueue(shared.order(unfinished), slots, shared.must_wait, shared.prepare)
    else:
        shared, queue = None, RunQueue(unfinished, slots)
    progress = _Progress(runs, len(runs) - len(unfinished), len(slots))

    def on_run_end(run: Run, attempt: Attempt) -> None:
        write_report()
        progress.on_run_end(run, attempt)

    def on_poll() -> None:
        progress.update(queue.running)
        if shared:
            shared.keep_checkpoints()

    try:
        queue.work(on_run_end, on_poll)
    finally:
        progress.close()
        write_report()
    return progress.failed


class _Progress:
    """Print a line for each run that starts or ends, and the remaining time.

    On a terminal, a bar shows all iterations. Elsewhere there is a line now and then.
    """

    def __init__(self, runs: list[Run], num_finished: int, num_slots: int) -> None:
        self.failed: list[str] = []
        self._num_slots = num_slots
        self._done = {run: run.iterations_done for run in runs}
        self._started: dict[Run, float] = {}
        self._ended: dict[Run, float] = {}  # seconds
        self._last_line = time.monotonic()
        self._bar = tqdm(
            total=sum(run.cfg.SOLVER.MAX_ITER for run in runs),
            initial=sum(self._done.values()),
            bar_format=_BAR,
            dynamic_ncols=True,
            file=sys.stdout,
            disable=None,
        )
        self._waiting = len(runs) - num_finished
        self._print(f"{len(runs)} runs: {num_finished} already finished, {num_slots} at a time")

    def on_run_end(self, run: Run, attempt: Attempt) -> None:
        self._announce(run)
        del self._started[run]
        self._ended[run] = attempt.seconds
        if attempt.exit_code == 0 and run.is_finished:
            self._print(f"{run.name}: AP {run.final_ap:.2f}, after {attempt.seconds:.0f} s")
            return
        console = run.output / CONSOLE_FILE
        reason = last_line(console) if attempt.exit_code else "it ended without a result"
        self.failed.append(f"{run.name}: exit code {attempt.exit_code}: {reason} (see {console})")
        self._print(f"failed: {self.failed[-1]}")

    def update(self, running: list[Run]) -> None:
        for run in running:
            self._announce(run)
        is_line_due = time.monotonic() - self._last_line >= LINE_SECONDS
        if not running or (self._bar.disable and not is_line_due):
            return
        for run in running:
            done = run.iterations_done
            self._bar.update(max(0, done - self._done[run]))
            self._done[run] = max(done, self._done[run])
        seconds = self._seconds_left(running)
        left = f"about {format_duration(seconds)} left" if seconds is not None else ""
        if self._bar.disable:
            self._last_line = time.monotonic()
            runs = [f"{run.name} (iter {self._done[run]})" for run in running]
            self._print("; ".join([f"running {', '.join(runs)}", *filter(None, [left])]))
        else:
            self._bar.set_description_str(", ".join(run.name for run in running))
            self._bar.set_postfix_str(left)

    def close(self) -> None:
        self._bar.close()

    def _announce(self, run: Run) -> None:
        if run not in self._started:
            self._started[run] = time.monotonic()
            self._waiting -= 1
            self._print(f"started {run.name}; log: {run.output / LOG_FILE}")

    def _seconds_left(self, running: list[Run]) -> float | None:
        """Estimate the time for all runs; None until all running ones have estimated theirs.

        Waiting runs count as much as the others on average.
        """
        estimates = [run.folder.curve("eta_seconds").values for run in running]
        if not all(estimates):
            return None
        left = [values[-1] for values in estimates]
        now = time.monotonic()
        whole = [now - self._started[run] + x for run, x in zip(running, left, strict=True)]
        waiting = self._waiting * mean([*whole, *self._ended.values()])
        return max(*left, (sum(left) + waiting) / self._num_slots)

    def _print(self, text: str) -> None:
        if self._bar.disable:
            print(text, flush=True)
        else:
            self._bar.write(text)


def last_line(file: Path) -> str:
    """Return the last line of a text file that is not empty."""
    lines = [line for line in file.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


def check_run(run: Run) -> None:
    """Run the checks of a training run that need only its config.

    Raises:
        UsageError: names the run.
    """
    try:
        check_supported(run.cfg)
        build_method(run.cfg)
        build_augmentation_policy(run.cfg)
        check_split_exists(run.cfg)
    except UsageError as error:
        raise UsageError(f"{run.name}: {error}") from error
    if (count := len(run.cfg.DATASETS.TEST)) != 1:
        raise UsageError(
            f"{run.config} has {count} sets in DATASETS.TEST: a comparison needs exactly one"
        )
    if run.cfg.SOLVER.EARLY_STOPPING_PATIENCE:
        raise UsageError(
            f"{run.name} may end early, and a comparison needs runs of the same length: set "
            "SOLVER.EARLY_STOPPING_PATIENCE 0"
        )
    if changes := run.changed_settings():
        raise UsageError(
            f"{run.output} was started with other settings: {'; '.join(changes[:3])}. Remove the "
            "folder or choose another --output"
        )


def check_not_set(options: Sequence[str], flags: Mapping[str, str]) -> None:
    """Check that options do not contain a key that the comparison sets itself.

    Args:
        options: ``KEY VALUE`` pairs.
        flags: key -> flag of the command line that sets it.

    Raises:
        UsageError: names the key and the flag.
    """
    for key, flag in flags.items():
        if key in options[::2]:
            raise UsageError(f"{key} is set by {flag}: remove it from the options")


def _check_options(configs: Sequence[Path], methods: Sequence[Path], keys: Sequence[str]) -> None:
    """Check that options do not override a key that distinguishes runs from each other.

    Raises:
        UsageError: names the key.
    """
    settings = [flatten_config(load_config(str(config), [])) for config in configs]
    for key in keys:
        if any(each.get(key) != settings[0].get(key) for each in settings):
            raise UsageError(
                f"{key} differs between the config files, an option would override it in all of "
                "them: remove it from the options"
            )
    for method in methods:
        load_config("", [], str(method))  # reports an invalid file
        method_settings = flatten_config(CfgNode.load_yaml_with_base(str(method)))
        for key in method_settings.keys() & set(keys):
            raise UsageError(
                f"{key} is set by {method} and cannot be an option. To change it for the other "
                "methods only, write a config file with _BASE_; to change it for all methods, "
                "leave this method out"
            )
