"""A step, or its floor, in a process of its own: its peak memory is nobody else's."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.timing import seconds_of
from benchmarks.workload import Floor, Size, Step


@dataclass(frozen=True)
class Cost:
    """Of one repetition.

    Attributes:
        seconds: median.
        before_mib: memory before the first one, models and PyTorch itself included.
        peak_mib: the largest memory at any time; of a GPU what PyTorch allocated there, otherwise
            the resident memory of the process.
    """

    seconds: float
    before_mib: float
    peak_mib: float


def cost_of(size: Size, *, floor: bool, repeats: int = 3, options: tuple[str, ...] = ()) -> Cost:
    """Measure in a new process."""
    words = [json.dumps([asdict(size), floor, repeats, options])]
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.child", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


def measure(size: Size, floor: bool, repeats: int, options: list[str]) -> Cost:
    bare = Floor(size, options)
    work = bare if floor else Step(size, bare.student.state_dict(), options)
    device = bare.device
    del bare
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = peak_mib(device)
    seconds = [seconds_of(work, device) for _ in range(repeats + 1)][1:]
    return Cost(statistics.median(seconds), before, peak_mib(device))


def peak_mib(device: torch.device) -> float:
    """Until now; of a GPU since it was last reset."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # Not getrusage, whose peak a process inherits from the one that started it.
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


if __name__ == "__main__":
    size, floor, repeats, options = json.loads(sys.argv[1])
    print(json.dumps(asdict(measure(Size(**size), floor, repeats, options))))
