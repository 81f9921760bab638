#!/usr/bin/env python
"""Time and peak memory of a training step of each method, relative to ``teacher_student``.

    python -m benchmarks.methods                       # R50-FPN, short side 640, 2 + 4 images
    OMP_NUM_THREADS=1 python -m benchmarks.methods --cpu-time --short-side 160
    python -m benchmarks.methods --methods mum cst

Teachers have random weights and fixed detections, so all methods have about the same number of
pseudo-labels. Loading of images is not included. Each method is measured in a new process.
"""

from __future__ import annotations

import argparse

from benchmarks.memory import measure_in_subprocess
from benchmarks.timing import print_table
from benchmarks.workload import BASE, ROOT, Workload
from locreweight.command_line import ConfigArgumentParser

REFERENCE = "teacher_student"
# Low enough for scores that are averaged with those of a random model.
OPTIONS = ["SEMI.PSEUDO_LABEL_THRESHOLD", "0.1"]
_WARM_UP_IMAGES = 8  # until then, MixPL has nothing to mix


def method_names() -> list[str]:
    """Return the names of all methods that use unlabeled images."""
    names = {path.stem for path in (ROOT / "configs" / "methods").glob("*.yaml")}
    return [REFERENCE, *sorted(names - {REFERENCE, "supervised"})]


def main() -> None:
    parser = ConfigArgumentParser(description=__doc__)
    default = Workload()
    parser.add_argument("--config-file", default=BASE, help="config of the detector")
    parser.add_argument(
        "--short-side", type=int, default=default.short_side, help="of the images, in pixels"
    )
    parser.add_argument("--labeled", type=int, default=2, help="labeled images")
    parser.add_argument("--unlabeled", type=int, default=4, help="unlabeled images; MUM needs 4")
    parser.add_argument("--repeats", type=int, default=3, help="number of repetitions")
    parser.add_argument("--methods", nargs="+", default=method_names(), help="as for --method")
    parser.add_argument(
        "--cpu-time", action="store_true", help="CPU time, for busy machines; with one thread"
    )
    args = parser.parse_args()
    workload = Workload.of_config(
        args.config_file,
        short_side=args.short_side,
        labeled=args.labeled,
        unlabeled=args.unlabeled,
    )
    compare(workload, args)


def compare(workload: Workload, args: argparse.Namespace) -> None:
    """Print time and memory of each method."""
    names = [REFERENCE, *(name for name in args.methods if name != REFERENCE)]
    costs = {
        name: measure_in_subprocess(
            workload,
            repeats=args.repeats,
            options=[*OPTIONS, *args.opts],
            method=name,
            warm_up=-(-_WARM_UP_IMAGES // workload.unlabeled),
            cpu_time=args.cpu_time,
        )
        for name in names
    }
    reference = costs[REFERENCE]
    rows = [
        [
            name,
            f"{1000 * cost.seconds:.0f}",
            f"{cost.seconds / reference.seconds:.2f}",
            f"{cost.peak_mib:.0f}",
            f"{cost.peak_mib / reference.peak_mib:.2f}",
        ]
        for name, cost in costs.items()
    ]
    headers = ["method", "ms: median", "relative", "peak MiB", "relative"]
    print_table(f"methods: {workload}", headers, rows)


if __name__ == "__main__":
    main()
