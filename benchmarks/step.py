#!/usr/bin/env python
"""One training step against bare Detectron2 on the same images, and where its time goes.

    python -m benchmarks.step                          # R50-FPN, short side 640, 2 + 2 images
    python -m benchmarks.step --short-side 320 --repeats 7
    python -m benchmarks.step SEMI.METHOD SoftTeacher

The floor is a student's forward and backward pass and a teacher's forward pass, and no more: no
optimizer, no moving average, no second look. Beside it stand the passes over the detector that
Unbiased Teacher makes, by bare Detectron2 as well, without the rest of its step. KEY VALUE pairs at
the end go over the step's config, not over the floor's.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch

from benchmarks.timing import Clock, alternate, matrix_product, median_ratio, show, spread
from benchmarks.workload import Floor, Size, Step, UnbiasedTeacherPasses

WEIGHTING_OFF = ["SEMI.LER", "False", "SEMI.PRC", "False"]
FLOOR, DRIFT = "floor: bare Detectron2", "fixed matrix product"


def compare(size: Size, repeats: int, options: list[str]) -> None:
    """Print the steps' times as multiples of the floor's."""
    floor = Floor(size, [])
    weights = floor.student.state_dict()
    works: dict[str, Callable[[], object]] = {
        FLOOR: floor,
        "LER + PRC": Step(size, weights, options),
        "neither": Step(size, weights, [*options, *WEIGHTING_OFF]),
        "passes of Unbiased Teacher": UnbiasedTeacherPasses(size, []),
        DRIFT: matrix_product(floor.device),
    }
    seconds = alternate(works, repeats, floor.device)
    rows = [
        [name, spread(of), f"{median_ratio(seconds, name, FLOOR):.3f}"]
        for name, of in seconds.items()
    ]
    show(f"step: {size}", ["", "seconds: median (range)", "times the floor"], rows)


def break_down(size: Size, repeats: int, options: list[str]) -> None:
    """Print what the parts of a step take."""
    floor = Floor(size, [])
    step = Step(size, floor.student.state_dict(), options)
    trainer = step.trainer
    clock = Clock(floor.device)
    monitored = [
        (trainer.teacher, "detect", "teacher: backbone, proposals, detections"),
        (trainer.teacher, "predict_rois", "teacher: second look, for PRC"),
        (trainer.model, "forward", "student: forward"),
        (torch.Tensor, "backward", "student: backward"),
        (trainer.optimizer.grad_scaler, "unscale_", "optimizer: check of gradients"),
        (trainer.optimizer.torch_optimizer, "step", "optimizer: update"),
        (trainer._average, "update", "teacher: moving average"),
    ]
    for owner, attribute, name in monitored:
        clock.watch(owner, attribute, name)
    parts: dict[str, list[float]] = {}
    for i in range(repeats + 1):
        clock.seconds.clear()
        with clock.part("whole step"):
            step()
        inner = [seconds for name, seconds in clock.seconds.items() if name != "whole step"]
        clock.seconds["the rest"] = clock.seconds["whole step"] - sum(inner)
        if i:  # the first one warms up
            for name, seconds in clock.seconds.items():
                parts.setdefault(name, []).append(seconds)
    whole = statistics.median(parts["whole step"])
    rows = [
        [name, spread(of, 1000, 0), f"{100 * statistics.median(of) / whole:.1f}"]
        for name, of in parts.items()
    ]
    show("parts of a step with LER + PRC", ["", "ms: median (range)", "% of the step"], rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Size()
    parser.add_argument("--short-side", type=int, default=default.short_side)
    parser.add_argument("--labeled", type=int, default=default.labeled)
    parser.add_argument("--unlabeled", type=int, default=default.unlabeled)
    parser.add_argument("--objects", type=int, default=default.objects, help="in each image")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs for the step")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    size = Size(args.short_side, args.labeled, args.unlabeled, args.objects)
    compare(size, args.repeats, args.opts)
    break_down(size, args.repeats, args.opts)


if __name__ == "__main__":
    main()
