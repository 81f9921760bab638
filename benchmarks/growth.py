#!/usr/bin/env python
"""How time and memory of a step grow with what it works on, beside bare Detectron2's.

    python -m benchmarks.growth --output docs/growth.png

One thing at a time is changed, from a small step on; each point is a process of its own.
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

from benchmarks.child import Cost, cost_of
from benchmarks.timing import show
from benchmarks.workload import Size

SMALL = Size(short_side=192, labeled=1, unlabeled=1, classes=20, proposals=256)
# What is changed, its values, and what of a step its cost should be a linear function of.
SERIES: dict[str, list[tuple[float, Size]]] = {
    "images of each kind": [(n, replace(SMALL, labeled=n, unlabeled=n)) for n in (1, 2, 4)],
    "megapixels of an image": [
        (math.prod(replace(SMALL, short_side=side).view) / 1e6, replace(SMALL, short_side=side))
        for side in (192, 288, 432)
    ],
    "sampled proposals of an image": [(n, replace(SMALL, proposals=n)) for n in (64, 256, 1000)],
    "classes": [(n, replace(SMALL, classes=n)) for n in (20, 160, 1280)],
    "pseudo-labels of an image": [(n, replace(SMALL, objects=n)) for n in (1, 10, 100)],
}
Points = list[tuple[float, Cost, Cost]]  # x, of the step, of the floor


def slopes(points: Points) -> list[str]:
    """Power of growth between the last two points, of the step's time and of the floor's.

    1 or less: no faster than linearly, however large the part that does not grow.
    """
    (x, *before), (bigger, *after) = points[-2:]
    return [
        f"{math.log(b.seconds / a.seconds) / math.log(bigger / x):.2f}"
        for a, b in zip(before, after, strict=True)
    ]


def plot(measured: dict[str, Points], file: Path) -> None:
    """Time above, memory below, one column for each thing that grows."""
    figure, axes = plt.subplots(2, len(measured), figsize=(3.2 * len(measured), 5.6))
    for column, (name, points) in zip(axes.T, measured.items(), strict=True):
        xs = [x for x, *_ in points]
        for axis, value in zip(column, ("seconds", "peak_mib"), strict=True):
            for i, label in ((1, "step"), (2, "bare Detectron2")):
                axis.plot(xs, [getattr(p[i], value) for p in points], "o-", label=label)
            axis.set_ylim(bottom=0)
            axis.set_xlim(left=0)
            axis.grid(alpha=0.3)
        column[1].set_xlabel(name)
    axes[0, 0].set_ylabel("seconds a step")
    axes[1, 0].set_ylabel("peak memory, MiB")
    axes[0, 0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("output/growth.png"))
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    measured: dict[str, Points] = {name: [] for name in SERIES}
    todo = [(name, x, size) for name, points in SERIES.items() for x, size in points]
    for name, x, size in tqdm(todo, disable=None):
        costs = (cost_of(size, floor=floor, repeats=args.repeats) for floor in (False, True))
        measured[name].append((x, *costs))
    rows = []
    for name, points in measured.items():
        for x, step, floor in points:
            last = x == points[-1][0]
            rows.append(
                [
                    name,
                    f"{x:g}",
                    *(step.seconds, floor.seconds, step.peak_mib, floor.peak_mib),
                    *(slopes(points) if last else ["", ""]),
                ]
            )
    headers = ["", "", "step, s", "floor, s", "step, MiB", "floor, MiB"]
    show(f"growth from: {SMALL}", [*headers, "power, step", "power, floor"], rows)
    plot(measured, args.output)
    print(f"\n{args.output}")


if __name__ == "__main__":
    main()
