#!/usr/bin/env python
"""Peak memory of a training step against that of bare Detectron2 on the same images.

    python -m benchmarks.memory
    python -m benchmarks.memory --paper     # 2 + 8 images, each as large as 800 x 1333; for a GPU

The floor holds the two models and the activations of student and teacher; the step holds momentum
and the teacher's features as well.
"""

from __future__ import annotations

import argparse

from benchmarks.child import cost_of
from benchmarks.timing import show
from benchmarks.workload import Size


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short-side", type=int, default=Size().short_side)
    parser.add_argument(
        "--paper", action="store_true", help="2 + 8 images of 800 x 1333 pixels' area; for a GPU"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs")
    args = parser.parse_args()
    size = Size(894, labeled=2, unlabeled=8) if args.paper else Size(args.short_side)
    costs = {
        name: cost_of(size, floor=floor, repeats=2, options=options)
        for name, floor, options in (
            ("floor: bare Detectron2", True, ()),
            ("step", False, tuple(args.opts)),
        )
    }
    least = next(iter(costs.values()))
    rows = [
        [
            name,
            f"{cost.before_mib:.0f}",
            f"{cost.peak_mib:.0f}",
            f"{cost.peak_mib / least.peak_mib:.3f}",
        ]
        for name, cost in costs.items()
    ]
    show(f"memory: {size}", ["", "MiB before", "peak MiB", "times the floor"], rows)


if __name__ == "__main__":
    main()
