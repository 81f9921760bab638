"""Timing and printing, shared by the benchmarks."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torchvision
from tabulate import tabulate

CPU = torch.device("cpu")
_now = time.perf_counter


def use_cpu_time() -> None:
    """Measure the CPU time of this process from now on, instead of the time that passes.

    Other programs on the machine hardly change it. For work on a CPU with one thread.
    """
    global _now
    _now = time.process_time


def environment() -> str:
    """Describe the machine, the number of threads and the versions in one line."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    parts = [f"{os.cpu_count()} x {names[0] if names else platform.machine()}"]
    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    threads = f"{torch.get_num_threads()} threads"
    versions = f"Python {platform.python_version()}, PyTorch {torch.__version__}"
    return ", ".join([*parts, threads, versions, f"torchvision {torchvision.__version__}"])


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished all of its work. Does nothing for a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Clock:
    """Measure the time that parts of a program take.

    Attributes:
        device: synchronized at the start and the end of each part.
        seconds: total time of each part, by name.
    """

    device: torch.device = CPU
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time of a ``with`` block to a part."""
        synchronize(self.device)
        start = _now()
        try:
            yield
        finally:
            synchronize(self.device)
            elapsed = _now() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed

    def time_calls(self, owner: object, attribute: str, name: str) -> None:
        """Add the time of all future calls of a method, or of a module's function, to a part."""
        original = getattr(owner, attribute)

        def timed(*args: object, **kwargs: object) -> object:
            with self.part(name):
                return original(*args, **kwargs)

        setattr(owner, attribute, timed)


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """Measure the time of one call."""
    clock = Clock(device)
    with clock.part(""):
        function()
    return clock.seconds[""]


def time_alternately(
    functions: Mapping[str, Callable[[], object]],
    repeats: int,
    device: torch.device = CPU,
    *,
    warm_up: int = 1,
) -> dict[str, list[float]]:
    """Time several functions in turn.

    If the machine is slower for a while, it is slower for all of them. Each repetition starts with
    another function, since a function may run slower after a heavy one.

    Args:
        functions: the functions to compare, by name.
        repeats: number of measured repetitions.
        device: the device that they run on.
        warm_up: number of repetitions before the measured ones.

    Returns:
        the seconds of each measured repetition, by name.
    """
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(warm_up + repeats):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            elapsed = seconds_of(functions[name], device)
            if i >= warm_up:
                seconds[name].append(elapsed)
    return seconds


def median_ratio(seconds: dict[str, list[float]], name: str, reference: str) -> float:
    """Return the median, over the repetitions, of a time divided by the reference's time."""
    pairs = zip(seconds[name], seconds[reference], strict=True)
    return statistics.median(x / y for x, y in pairs)


def matrix_product(device: torch.device, size: int = 1024) -> Callable[[], object]:
    """Return a function with a fixed amount of work, whose time shows how the machine drifts."""
    matrix = torch.rand(size, size, device=device)
    return lambda: [matrix @ matrix for _ in range(10)]


def format_range(values: list[float], factor: float = 1.0, digits: int = 2) -> str:
    """Format values as ``median (smallest to largest)``."""
    scaled = [value * factor for value in values]
    low, mid, high = min(scaled), statistics.median(scaled), max(scaled)
    return f"{mid:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def print_table(title: str, headers: list[str], rows: list[list]) -> None:
    """Print a Markdown table with a title and the environment."""
    print(f"\n{title}\n{environment()}\n")
    print(tabulate(rows, headers=headers, tablefmt="github", floatfmt=".2f"), flush=True)
