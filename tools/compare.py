#!/usr/bin/env python
"""Train configs, with several methods and seeds, and put the results into one table.

    python tools/compare.py --config-file configs/quickstart.yaml \\
        --methods configs/methods/*.yaml --seeds 1 2 3 --output output/comparison
    python tools/compare.py --config-file configs/table3/*.yaml --seeds 1 2 --output output/t3

Runs go on one after another, or side by side on the GPUs that are there. Called again with the same
words it goes on where it was stopped, leaves out what is finished and tries again what has failed.
After each run --output has results.csv (all runs), table.md (means and spreads) and curves.png.

A seed chooses the start weights, the order of images, and which images are labeled: methods with
the same seed see the same split. KEY VALUE pairs come last, not right behind --seeds, and hold for
all runs (with DATASETS.SPLIT_SEED all seeds see one split). They may not touch what one of the
methods decides, or what the configs differ in: it would be another method then.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
from pathlib import Path
from types import FrameType

from detectron2.config import CfgNode
from tqdm import tqdm

from locreweight.config import check_supported, load_config
from locreweight.data.datasets.splits import check_split_exists
from locreweight.data.transforms.policies import build_augmentation_policy
from locreweight.engine.run_queue import CONSOLE, Attempt, Run, RunQueue, gpu_slots
from locreweight.engine.run_results import (
    changed_settings,
    flatten_config,
    is_finished,
    iterations_of,
    results_of,
)
from locreweight.errors import UsageError
from locreweight.methods import build_method
from locreweight.visualization.comparison_report import CURVES, TABLE, write_report


class Progress:
    """Lines about runs that end, and on a terminal a bar of all their iterations."""

    def __init__(self, runs: list[Run], waiting: list[Run], num_places: int) -> None:
        self.failed: list[str] = []
        self._runs = runs
        self._output = runs[0].output.parent.parent
        self._done = {run: iterations_of(run) for run in runs}
        self._bar = tqdm(
            total=sum(run.cfg.SOLVER.MAX_ITER for run in runs),
            initial=sum(self._done.values()),
            unit="iteration",
            disable=None,
        )
        self._say(
            f"{len(runs)} runs, {len(runs) - len(waiting)} of them finished before, "
            f"{num_places} at a time"
        )

    def after_run(self, run: Run, attempt: Attempt) -> None:
        """Report on a run that has ended, and bring the tables up to date."""
        write_report(self._runs, self._output)
        if attempt.exit_code == 0 and is_finished(run):
            result = results_of(run)
            assert result is not None
            ap = "no test set" if math.isnan(result.ap) else f"AP {result.ap:.2f}"
            self._say(f"{run.name}: {ap}, after {attempt.seconds:.0f} s")
            return
        console = run.output / CONSOLE
        why = last_line(console) if attempt.exit_code else "it has ended without a result"
        self.failed.append(f"{run.name}: exit code {attempt.exit_code}: {why} (see {console})")
        self._say(f"not finished: {self.failed[-1]}")

    def while_running(self, running: list[Run]) -> None:
        """Move the bar."""
        if self._bar.disable:
            return
        for run in running:
            now = iterations_of(run)
            self._bar.update(max(0, now - self._done[run]))
            self._done[run] = max(now, self._done[run])

    def close(self) -> None:
        self._bar.close()

    def _say(self, text: str) -> None:
        if self._bar.disable:
            print(text, flush=True)
        else:
            self._bar.write(text)


def runs_of(args: argparse.Namespace) -> list[Run]:
    """All runs of a comparison, checked.

    Raises:
        UsageError: if one of them cannot be, or was begun with other settings.
    """
    runs = [
        Run(
            config=config,
            method=method,
            seed=seed,
            output=folder_of(args.output, config, method) / f"seed-{seed}",
            options=tuple(args.opts),
            num_gpus=args.num_gpus,
        )
        for seed in dict.fromkeys(args.seeds)
        for config in args.config_file
        for method in args.methods or [None]
    ]
    if len({run.output for run in runs}) < len(runs):
        raise UsageError("two of the files have the same name: their runs would share a folder")
    check_rows_stay_themselves(args.config_file, args.methods or [], args.opts[::2])
    for run in runs:
        check_run(run)
    return runs


def check_run(run: Run) -> None:
    """What its training would refuse sooner or later, as far as the config alone tells.

    Raises:
        UsageError: names it.
    """
    try:
        check_supported(run.cfg)
        build_method(run.cfg)
        build_augmentation_policy(run.cfg)
        check_split_exists(run.cfg)
    except UsageError as error:
        raise UsageError(f"{run.name}: {error}") from error
    if len(run.cfg.DATASETS.TEST) > 1:
        raise UsageError(f"{run.config} names several sets in DATASETS.TEST; compare on one")
    if changes := changed_settings(run):
        raise UsageError(
            f"{run.output} was begun with other settings: {'; '.join(changes[:3])}. Remove it, "
            "or give another --output"
        )


def check_rows_stay_themselves(configs: list[Path], methods: list[Path], keys: list[str]) -> None:
    """Raises UsageError if options with these keys set what tells rows or seeds apart."""
    for key, instead in {"SEED": "--seeds", "OUTPUT_DIR": "--output"}.items():
        if key in keys:
            raise UsageError(f"{key} is set by {instead}")
    settings = [flatten_config(load_config(str(config), [])) for config in configs]
    for key in keys:
        if any(each.get(key) != settings[0].get(key) for each in settings):
            raise UsageError(f"{key} differs between the config files; it is for them to decide")
    for method in methods:
        load_config("", [], str(method))  # says what is wrong with the file, if anything is
        decided = flatten_config(CfgNode.load_yaml_with_base(str(method)))
        for key in decided.keys() & set(keys):
            raise UsageError(
                f"{key} is for {method} to decide. For the other methods, set it in a config file "
                "of its own, with _BASE_; for all of them, leave that method out"
            )


def folder_of(output: Path, config: Path, method: Path | None) -> Path:
    """Of all seeds of a config and a method."""
    return output / "-".join([config.stem, *([method.stem] if method else [])])


def last_line(file: Path) -> str:
    """Of a text file, without those that are empty."""
    lines = [line for line in file.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


def compare(args: argparse.Namespace) -> list[str]:
    """Do all runs; returns those that have failed, in words.

    Raises:
        UsageError: for what the user has to put right before anything is run.
    """
    runs = runs_of(args)
    on_gpus = runs[0].cfg.MODEL.DEVICE.startswith("cuda")
    try:
        found = gpu_slots(args.num_gpus, args.parallel, on_gpus)
    except ValueError as error:
        raise UsageError(str(error)) from error
    waiting = [run for run in runs if not is_finished(run)]
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder --output: {error}") from error
    queue = RunQueue(waiting, found)
    progress = Progress(runs, waiting, len(found))
    try:
        queue.work(progress.after_run, lambda: progress.while_running(queue.running))
    finally:
        progress.close()
        write_report(runs, args.output)
    return progress.failed


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file", type=Path, nargs="+", required=True, metavar="FILE", help="one row each"
    )
    parser.add_argument(
        "--methods",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="laid over each config: configs/methods/*.yaml",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], metavar="N")
    parser.add_argument("--num-gpus", type=positive, default=1, help="of each run")
    parser.add_argument(
        "--parallel",
        type=positive,
        help="runs at a time; otherwise as many as the GPUs allow, or 1",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of runs and results")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs for all runs")
    args = parser.parse_args(arguments)
    args.output = args.output.absolute()
    return args


def positive(text: str) -> int:
    """A number of things, one at least."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    args = parse_arguments()
    # A scheduler's signal, or a terminal that closes, ends a comparison as Ctrl-C does: with its
    # runs, and not without them. After nohup it goes on.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)
    try:
        failed = compare(args)
    except UsageError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped: the same command goes on")
    print(f"\n{(args.output / TABLE).read_text()}\ncurves: {args.output / CURVES}")
    if failed:
        sys.exit("\n".join([f"{len(failed)} runs have failed:", *failed]))


if __name__ == "__main__":
    main()
