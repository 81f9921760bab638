"""What all benchmarks share: where they run, and how things are timed beside each other."""

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


def environment() -> str:
    """Machine, threads and versions, in one line."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    parts = [f"{os.cpu_count()} x {names[0] if names else platform.machine()}"]
    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    threads = f"{torch.get_num_threads()} threads"
    versions = f"Python {platform.python_version()}, PyTorch {torch.__version__}"
    return ", ".join([*parts, threads, versions, f"torchvision {torchvision.__version__}"])


def wait_for(device: torch.device) -> None:
    """Until a GPU has done all that it was asked for; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Clock:
    """Seconds that parts of a program take, by name; all that happened since it was made.

    Attributes:
        device: waited for at both ends of each part.
        seconds: name -> sum of all that had it.
    """

    device: torch.device = CPU
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        wait_for(self.device)
        start = time.perf_counter()
        try:
            yield
        finally:
            wait_for(self.device)
            spent = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + spent

    def watch(self, owner: object, attribute: str, name: str) -> None:
        """Time each call of a method, or of a function in a module, from now on."""
        original = getattr(owner, attribute)

        def timed(*args: object, **kwargs: object) -> object:
            with self.part(name):
                return original(*args, **kwargs)

        setattr(owner, attribute, timed)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """How long a call takes."""
    clock = Clock(device)
    with clock.part(""):
        work()
    return clock.seconds[""]


def alternate(
    works: Mapping[str, Callable[[], object]],
    repeats: int,
    device: torch.device = CPU,
    *,
    warm_up: int = 1,
) -> dict[str, list[float]]:
    """Seconds of each repetition, by name.

    In turn, so that a machine which is slower for a while is so for all; each repetition begins
    with another, as what runs after a heavy one may find it has left its traces.

    Args:
        works: what is compared.
        repeats: measured repetitions.
        device: that it runs on.
        warm_up: repetitions before these.
    """
    names = list(works)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(warm_up + repeats):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            spent = seconds_of(works[name], device)
            if i >= warm_up:
                seconds[name].append(spent)
    return seconds


def median_ratio(seconds: dict[str, list[float]], name: str, reference: str) -> float:
    """Median over the repetitions of one time divided by the other's of the same repetition."""
    pairs = zip(seconds[name], seconds[reference], strict=True)
    return statistics.median(x / y for x, y in pairs)


def matrix_product(device: torch.device, size: int = 1024) -> Callable[[], object]:
    """A fixed amount of arithmetic, to see how far the machine itself drifts."""
    matrix = torch.rand(size, size, device=device)
    return lambda: [matrix @ matrix for _ in range(10)]


def spread(values: list[float], factor: float = 1.0, digits: int = 2) -> str:
    """``median (least to greatest)``."""
    scaled = [value * factor for value in values]
    low, mid, high = min(scaled), statistics.median(scaled), max(scaled)
    return f"{mid:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def show(title: str, headers: list[str], rows: list[list]) -> None:
    """Print a table as Markdown, under what it was measured with."""
    print(f"\n{title}\n{environment()}\n")
    print(tabulate(rows, headers=headers, tablefmt="github", floatfmt=".2f"), flush=True)
