#!/usr/bin/env python
"""Time of a training step, compared with plain Detectron2 on the same images, and its parts.

    python -m benchmarks.step                          # R50-FPN, short side 640, 2 + 2 images
    python -m benchmarks.step --short-side 320 --repeats 7
    python -m benchmarks.step SEMI.METHOD SoftTeacher
    python -m benchmarks.step --config-file configs/detectors/cpu-mobilenetv2.yaml --short-side 224

The baseline is a forward and backward pass of the student and a forward pass of the teacher,
without optimizer, EMA update and the teacher's predictions for the student's proposals. Plain
Detectron2 is also measured with SGD and an EMA update, and with the passes that Unbiased Teacher
makes. KEY VALUE pairs at the end override the config of the step, not of the baseline.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch

from benchmarks.timing import (
    Clock,
    format_range,
    matrix_product,
    median_ratio,
    print_table,
    time_alternately,
    use_cpu_time,
)
from benchmarks.workload import (
    BASE,
    Detectron2Baseline,
    Detectron2Training,
    TrainerStep,
    UnbiasedTeacherBaseline,
    Workload,
)
from locreweight.command_line import ConfigArgumentParser

NO_REWEIGHTING = ["SEMI.METHOD", "LocReweight", "SEMI.LER", "False", "SEMI.PRC", "False"]
BASELINE = "plain Detectron2"
WITH_UPDATES = "plain Detectron2 with SGD and EMA"


def compare(workload: Workload, repeats: int, options: list[str]) -> None:
    """Print the times of steps as multiples of the baseline's."""
    baseline = Detectron2Baseline(workload, [])
    weights = baseline.student.state_dict()
    functions: dict[str, Callable[[], object]] = {
        BASELINE: baseline,
        WITH_UPDATES: Detectron2Training(workload, []),
        "step, LER + PRC": TrainerStep(workload, weights, options),
        "step, neither": TrainerStep(workload, weights, [*options, *NO_REWEIGHTING]),
        "passes of Unbiased Teacher": UnbiasedTeacherBaseline(workload, []),
        "fixed matrix product (drift)": matrix_product(baseline.device),
    }
    seconds = time_alternately(functions, repeats, baseline.device)
    rows = [
        [
            name,
            format_range(times, digits=3),
            *(f"{median_ratio(seconds, name, x):.3f}" for x in (BASELINE, WITH_UPDATES)),
        ]
        for name, times in seconds.items()
    ]
    headers = ["", "seconds: median (range)", "time / plain", "time / with updates"]
    print_table(f"step: {workload}", headers, rows)


def break_down(workload: Workload, repeats: int, options: list[str]) -> None:
    """Print the time of each part of a step."""
    baseline = Detectron2Baseline(workload, [])
    step = TrainerStep(workload, baseline.student.state_dict(), options)
    trainer = step.trainer
    clock = Clock(baseline.device)
    for owner, attribute, name in (
        (trainer.teacher, "detect", "teacher: backbone, proposals, detections"),
        (trainer.teacher, "predict_rois", "teacher: predictions for student proposals (PRC)"),
        (trainer.model, "forward", "student: forward"),
        (torch.Tensor, "backward", "student: backward"),
        (trainer.optimizer.grad_scaler, "unscale_", "optimizer: gradient check"),
        (trainer.optimizer.torch_optimizer, "step", "optimizer: update"),
        (trainer.models.average, "update", "teacher: EMA update"),
    ):
        clock.time_calls(owner, attribute, name)
    parts: dict[str, list[float]] = {}
    for i in range(repeats + 1):
        clock.seconds.clear()
        with clock.part("whole step"):
            step()
        inner = [seconds for name, seconds in clock.seconds.items() if name != "whole step"]
        clock.seconds["other"] = clock.seconds["whole step"] - sum(inner)
        if i:  # the first repetition is a warm-up
            for name, seconds in clock.seconds.items():
                parts.setdefault(name, []).append(seconds)
    whole = statistics.median(parts["whole step"])
    rows = [
        [name, format_range(times, 1000, 0), f"{100 * statistics.median(times) / whole:.1f}"]
        for name, times in parts.items()
    ]
    print_table("parts of a step, LER + PRC", ["", "ms: median (range)", "% of the step"], rows)


def parse_arguments() -> argparse.Namespace:
    parser = ConfigArgumentParser(description=__doc__)
    default = Workload()
    parser.add_argument("--config-file", default=BASE, help="config of the detector")
    parser.add_argument(
        "--short-side", type=int, default=default.short_side, help="of the images, in pixels"
    )
    parser.add_argument("--labeled", type=int, default=default.labeled, help="labeled images")
    parser.add_argument("--unlabeled", type=int, default=default.unlabeled, help="unlabeled images")
    parser.add_argument("--objects", type=int, default=default.objects, help="per image")
    parser.add_argument("--repeats", type=int, default=5, help="number of repetitions")
    parser.add_argument(
        "--cpu-time", action="store_true", help="CPU time, for busy machines; with one thread"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.cpu_time:
        use_cpu_time()
    workload = Workload.of_config(
        args.config_file,
        short_side=args.short_side,
        labeled=args.labeled,
        unlabeled=args.unlabeled,
        objects=args.objects,
    )
    compare(workload, args.repeats, args.opts)
    break_down(workload, args.repeats, args.opts)


if __name__ == "__main__":
    main()
