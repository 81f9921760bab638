#!/usr/bin/env python
"""The teacher's update against the usual loop over state_dict, and against memory's own speed.

    python -m benchmarks.ema

The bound is one pass over two flat vectors as long as the model that reads both and writes one.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from detectron2.modeling import build_model
from torch.profiler import ProfilerActivity, profile

from benchmarks.timing import alternate, median_ratio, show, spread
from benchmarks.workload import Size, average_by_state_dict, make_config
from locreweight.ema import MovingAverage, update_teacher

KEEP_RATE = 0.9996
LOOP, BOUND = "loop over state_dict", "bound: read two, write one"


def allocated_mib(work: MovingAverage) -> float:
    """All that an update allocates, on a GPU its peak."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work.update(KEEP_RATE)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work.update(KEEP_RATE)
    events = recorded.events() or []
    return sum(max(e.self_cpu_memory_usage, 0) for e in events) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cfg = make_config(Size(), Path(folder), [])
    teacher, student = build_model(cfg), build_model(cfg)
    average = MovingAverage(teacher, student)
    numbers = sum(t.numel() for t in [*teacher.parameters(), *teacher.buffers()])
    old, new = torch.zeros(2, numbers, device=teacher.device)
    works = {
        BOUND: lambda: torch.add(old, new, out=old),
        "MovingAverage.update": lambda: average.update(KEEP_RATE),
        "update_teacher, which looks up all tensors": lambda: update_teacher(
            teacher, student, KEEP_RATE
        ),
        LOOP: lambda: average_by_state_dict(teacher, student),
    }
    seconds = alternate(works, args.repeats, teacher.device, warm_up=3)
    rows = [
        [
            name,
            spread(of, 1000, 2),
            f"{median_ratio(seconds, name, BOUND):.2f}",
            f"{median_ratio(seconds, LOOP, name):.1f}",
        ]
        for name, of in seconds.items()
    ]
    headers = ["", "ms: median (range)", "times the bound", "times as fast as the loop"]
    show(f"ema: R50-FPN, {numbers / 1e6:.1f} million numbers", headers, rows)
    print(f"An update allocates {allocated_mib(average):.3f} MiB; the model has", end=" ")
    print(f"{4 * numbers / 2**20:.0f} MiB.")


if __name__ == "__main__":
    main()
