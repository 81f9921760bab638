#!/usr/bin/env python
"""Speed of the teacher's EMA update.

    python -m benchmarks.ema

Compares it with the usual loop over ``state_dict`` and with a lower bound: one operation on two
flat vectors of the model's size, which reads both and writes one.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from detectron2.modeling import build_model
from torch.profiler import ProfilerActivity, profile

from benchmarks.timing import format_range, median_ratio, print_table, time_alternately
from benchmarks.workload import Workload, make_config, update_by_state_dict
from locreweight.command_line import HelpFormatter
from locreweight.ema import MovingAverage, update_teacher

KEEP_RATE = 0.9996
LOOP, BOUND = "loop over state_dict", "bound: read two, write one"


def allocated_mib(average: MovingAverage) -> float:
    """Return the memory that an update allocates: its peak on a GPU, the total on a CPU."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        average.update(KEEP_RATE)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        average.update(KEEP_RATE)
    events = recorded.events() or []
    return sum(max(e.self_cpu_memory_usage, 0) for e in events) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--repeats", type=int, default=30, help="number of repetitions")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cfg = make_config(Workload(), Path(folder), [])
    teacher, student = build_model(cfg), build_model(cfg)
    average = MovingAverage(teacher, student)
    size = sum(t.numel() for t in [*teacher.parameters(), *teacher.buffers()])
    old, new = torch.zeros(2, size, device=teacher.device)
    functions = {
        BOUND: lambda: torch.add(old, new, out=old),
        "MovingAverage.update": lambda: average.update(KEEP_RATE),
        "update_teacher (collects all tensors first)": lambda: update_teacher(
            teacher, student, KEEP_RATE
        ),
        LOOP: lambda: update_by_state_dict(teacher, student),
    }
    seconds = time_alternately(functions, args.repeats, teacher.device, warm_up=3)
    rows = [
        [
            name,
            format_range(times, 1000, 2),
            f"{median_ratio(seconds, name, BOUND):.2f}",
            f"{median_ratio(seconds, LOOP, name):.1f}",
        ]
        for name, times in seconds.items()
    ]
    headers = ["", "ms: median (range)", "time / bound", "loop / time"]
    print_table(f"ema: R50-FPN, {size / 1e6:.1f} million values", headers, rows)
    print(f"An update allocates {allocated_mib(average):.3f} MiB; the model has", end=" ")
    print(f"{4 * size / 2**20:.0f} MiB.")


if __name__ == "__main__":
    main()
