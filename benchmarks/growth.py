#!/usr/bin/env python
"""How time and memory of a training step grow with its input, compared with plain Detectron2.

    python -m benchmarks.growth --output docs/growth.png

Starting from a small step, one quantity at a time is increased. Each point is measured in a new
process.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tqdm import tqdm

from benchmarks.memory import Cost, measure_in_subprocess
from benchmarks.timing import print_table
from benchmarks.workload import Workload
from locreweight.command_line import HelpFormatter

SMALL = Workload(short_side=192, labeled=1, unlabeled=1, classes=20, proposals=256)
# Name of a quantity -> its values and the workload for each. Costs should grow at most linearly.
SERIES: dict[str, list[tuple[float, Workload]]] = {
    "images of each kind": [(n, replace(SMALL, labeled=n, unlabeled=n)) for n in (1, 2, 4)],
    "megapixels per image": [
        (
            math.prod(replace(SMALL, short_side=side).view_size) / 1e6,
            replace(SMALL, short_side=side),
        )
        for side in (192, 288, 432)
    ],
    "sampled proposals per image": [(n, replace(SMALL, proposals=n)) for n in (64, 256, 1000)],
    "classes": [(n, replace(SMALL, classes=n)) for n in (20, 160, 1280)],
    "pseudo-labels per image": [(n, replace(SMALL, objects=n)) for n in (1, 10, 100)],
}
Points = list[tuple[float, Cost, Cost]]  # value of the quantity, cost of the step, of the baseline


def growth_exponents(points: Points) -> list[str]:
    """Return the exponents of growth in time between the last two points, of step and baseline.

    An exponent of at most 1 means that the time grows at most linearly.
    """
    (x, *before), (larger_x, *after) = points[-2:]
    return [
        f"{math.log(b.seconds / a.seconds) / math.log(larger_x / x):.2f}"
        for a, b in zip(before, after, strict=True)
    ]


def plot(measured: dict[str, Points], file: Path) -> None:
    """Plot time (top row) and memory (bottom row), with one column per quantity."""
    figure, axes = plt.subplots(2, len(measured), figsize=(3.2 * len(measured), 5.6))
    for column, (name, points) in zip(axes.T, measured.items(), strict=True):
        xs = [x for x, *_ in points]
        for axis, value in zip(column, ("seconds", "peak_mib"), strict=True):
            for i, label in ((1, "step"), (2, "plain Detectron2")):
                axis.plot(xs, [getattr(p[i], value) for p in points], "o-", label=label)
            axis.set_ylim(bottom=0)
            axis.set_xlim(left=0)
            axis.grid(alpha=0.3)
        column[1].set_xlabel(name)
    axes[0, 0].set_ylabel("seconds per step")
    axes[1, 0].set_ylabel("peak memory, MiB")
    axes[0, 0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--repeats", type=int, default=2, help="number of repetitions")
    parser.add_argument(
        "--output", type=Path, default=Path("output/growth.png"), help="picture to write"
    )
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    measured: dict[str, Points] = {name: [] for name in SERIES}
    todo = [(name, x, workload) for name, points in SERIES.items() for x, workload in points]
    for name, x, workload in tqdm(todo, disable=None):
        step, baseline = (
            measure_in_subprocess(workload, baseline=baseline, repeats=args.repeats)
            for baseline in (False, True)
        )
        measured[name].append((x, step, baseline))
    rows = []
    for name, points in measured.items():
        for x, step, baseline in points:
            memory = step.peak_mib, baseline.peak_mib
            exponents = growth_exponents(points) if x == points[-1][0] else ["", ""]
            rows.append([name, f"{x:g}", step.seconds, baseline.seconds, *memory, *exponents])
    headers = ["", "", "step, s", "Detectron2, s", "step, MiB", "Detectron2, MiB"]
    headers += ["growth exponent, step", "growth exponent, Detectron2"]
    print_table(f"growth from: {SMALL}", headers, rows)
    plot(measured, args.output)
    print(f"\n{args.output}")


if __name__ == "__main__":
    main()
