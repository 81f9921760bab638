#!/usr/bin/env python
"""Train configs with several methods and seeds and tabulate the results.

    python tools/compare.py --config-file configs/quickstart.yaml \\
        --methods loc_reweight soft_teacher --seeds 1 2 3 --output output/comparison
    python tools/compare.py --config-file configs/table3/*.yaml --seeds 1 2 --output output/t3

Runs are started one after another, or several at a time on different GPUs. The same command resumes
an interrupted comparison (exit code 75): it skips finished runs, resumes the others and repeats
failed ones. After each run, the folder --output gets results.csv (all runs), table.md (means and
standard deviations) and curves.png.

A seed sets the initial weights, the order of images, and which images are labeled, so that all
methods with one seed use the same split. With DATASETS.SPLIT_SEED all seeds use one split. KEY
VALUE pairs apply to all runs; they can stand anywhere but directly after --config-file, --methods
and --seeds. Keys that a method sets or that differ between the config files cannot be given: the
runs would no longer be what their row in the table says.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from locreweight.command_line import (
    ConfigArgumentParser,
    count_of,
    interrupt_on_signals,
    positive,
    reports_errors,
)
from locreweight.engine.comparison import plan_runs, run_all
from locreweight.engine.preemption import EXIT_CODE
from locreweight.visualization.comparison_report import CURVES, TABLE, write_report


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = ConfigArgumentParser(description=__doc__)
    parser.add_argument(
        "--config-file",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="each is one row of the table",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[],
        metavar="METHOD",
        help="names of files in configs/methods, such as soft_teacher, or paths of config files; "
        "each is combined with each config. Default: the config's own method",
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[1], metavar="N", help="random seeds"
    )
    parser.add_argument("--num-gpus", type=positive, default=1, help="number of GPUs per run")
    parser.add_argument(
        "--parallel",
        type=positive,
        help="number of runs at a time. Default: as many as the GPUs allow, or 1 without GPUs",
    )
    parser.add_argument(
        "--runs-per-gpu",
        type=positive,
        default=1,
        metavar="N",
        help="number of runs that share a GPU. Small detectors use little of a large one",
    )
    parser.add_argument(
        "--share-burn-in",
        action="store_true",
        help="train the burn-in that several runs have in common only once: the others continue "
        "from its checkpoint, with the same weights. Metrics of pseudo-labels during burn-in are "
        "those of the run that trains it",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for runs and results")
    args = parser.parse_args(arguments)
    args.output = args.output.absolute()
    return args


@reports_errors
def main() -> None:
    args = parse_arguments()
    interrupt_on_signals()
    try:
        runs = plan_runs(
            args.config_file, args.methods, args.seeds, args.output, args.opts, args.num_gpus
        )
        failed = run_all(
            runs,
            args.parallel,
            lambda: write_report(runs, args.output),
            share_burn_in=args.share_burn_in,
            runs_per_gpu=args.runs_per_gpu,
        )
    except KeyboardInterrupt:
        print("stopped; to resume, repeat the command", file=sys.stderr)
        sys.exit(EXIT_CODE)
    print(f"\n{(args.output / TABLE).read_text()}\ncurves: {args.output / CURVES}")
    if failed:
        sys.exit("\n".join([f"{count_of(len(failed), 'run')} failed:", *failed]))


if __name__ == "__main__":
    main()
