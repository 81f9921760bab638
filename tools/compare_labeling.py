#!/usr/bin/env python
"""Measure whether labeling suggested images is better than labeling random ones.

    python tools/compare_labeling.py --config-file configs/bccd-small.yaml \
        --percent 5 --add 5 --seeds 1 2 3 --output output/labeling

The data set must be annotated. For each seed, a model is trained with --percent of the labels. Then
--add percent are added: of the images that tools/suggest_labels.py suggests with this model, or of
random ones, and a new model is trained with each. The table also shows the number of labeled boxes,
which is what labeling costs. The same command resumes an interrupted comparison (exit code 75).
"""

from __future__ import annotations

import argparse
import csv
import sys
from dataclasses import asdict
from pathlib import Path

from locreweight.command_line import (
    ConfigArgumentParser,
    interrupt_on_signals,
    positive,
    reports_errors,
)
from locreweight.engine.labeling_comparison import LabelingPlan, compare_labeling, labeling_table
from locreweight.engine.preemption import EXIT_CODE


def parse_arguments() -> argparse.Namespace:
    parser = ConfigArgumentParser(description=__doc__)
    parser.add_argument("--config-file", type=Path, required=True, metavar="FILE", help="config")
    parser.add_argument("--method", default="", help="a method of configs/methods, or a file")
    parser.add_argument("--percent", type=float, default=5.0, help="first labels, in percent")
    parser.add_argument("--add", type=float, default=5.0, help="added labels, in percent")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="N", help="random seeds"
    )
    parser.add_argument("--num-gpus", type=positive, default=1, help="number of GPUs per run")
    parser.add_argument(
        "--parallel",
        type=positive,
        help="number of runs at a time. Default: as many as the GPUs allow, or 1 without GPUs",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for runs and results")
    return parser.parse_args()


@reports_errors
def main() -> None:
    args = parse_arguments()
    interrupt_on_signals()
    plan = LabelingPlan(
        config=args.config_file,
        output=args.output.absolute(),
        percent=args.percent,
        add=args.add,
        method=args.method,
        options=tuple(args.opts),
        num_gpus=args.num_gpus,
    )
    try:
        results = compare_labeling(plan, args.seeds, args.parallel)
    except KeyboardInterrupt:
        print("stopped; to resume, repeat the command", file=sys.stderr)
        sys.exit(EXIT_CODE)
    with (args.output / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, asdict(results[0]))
        writer.writeheader()
        writer.writerows(map(asdict, results))
    table = labeling_table(results)
    (args.output / "table.md").write_text(f"{table}\n")
    print(f"\n{table}\n\nresults: {args.output}")


if __name__ == "__main__":
    main()
