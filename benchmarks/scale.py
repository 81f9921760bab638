#!/usr/bin/env python
"""How start-up and memory grow with the number of images, beside a plain list of dictionaries.

    python -m benchmarks.scale

Names a million unlabeled images and 120,000 annotated ones in the ways that DATASETS knows, and as
a Python list of dictionaries given to torch's DataLoader, with the same mapper. Each run is a
process of its own with two forked loader workers; runs of different ways alternate, and the table
has medians. The images are hard links to a few small files, in a temporary folder of about 150 MB,
which is removed; making them takes a minute.

Counted is the time from the config, or the list, to the first batch, without imports. Memory is
what the kernel says (smaps_rollup), when each worker has read through every record once, in random
order, as in an epoch: RSS all pages that a process sees, USS those that are its own, PSS those and
its share of the others. What a worker grew by is the difference to the same with 1,000 images.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate
from torch.utils.data import DataLoader, Dataset

from benchmarks.scale_data import ANNOTATED_WAYS, UNLABELED_WAYS, WAYS, Source, Tree, make_tree
from benchmarks.timing import environment

WORKERS = 2
BATCH = 8
CONTROL = 1000  # images; what a worker takes with these is no growth
MB = 1e6
COLUMNS = (
    "way",
    "first batch, s",
    "main: RSS, MB",
    "main: peak, MB",
    "worker: RSS, MB",
    "PSS",
    "USS",
    "worker grew by: RSS, MB",
    "USS",
    "all: PSS, MB",
)


@dataclass(frozen=True)
class Memory:
    """Of one process, in bytes."""

    rss: int
    pss: int
    uss: int

    @classmethod
    def of_this_process(cls) -> Memory:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
        size = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        return cls(size["Rss"], size["Pss"], size["Private_Clean"] + size["Private_Dirty"])


@dataclass(frozen=True)
class Run:
    """What one run measured; memory in MB, that of a worker is the larger of two."""

    imports: float
    first_batch: float
    main: float
    peak: float
    rss: float
    pss: float
    uss: float
    together: float


# -- one run, in a process of its own -------------------------------------------------------------

_EPOCH = -1  # in place of the number of a sample: look up all records, then say the memory


class Samples(Dataset):
    """A source's samples, and the memory of the worker that is asked for an epoch."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __getitem__(self, number: int) -> Any:
        if number != _EPOCH:
            self._source.sample(number)
            return None
        for each in range(self._source.size):
            pickle.dumps(self._source.look_up(each))  # goes through all of it, as mappers do
        return Memory.of_this_process()


def batches() -> Iterator[list[int]]:
    """A batch for each worker, then an epoch for each."""
    yield from ([BATCH * i + k for k in range(BATCH)] for i in range(WORKERS))
    yield from ([_EPOCH] for _ in range(WORKERS))


def measure(way: str, tree: Tree, imports: float) -> Run:
    began = time.perf_counter()
    samples = Samples(WAYS[way](tree))
    loader = DataLoader(
        samples,
        batch_sampler=list(batches()),
        num_workers=WORKERS,
        collate_fn=list,
        multiprocessing_context="fork",
    )
    made = iter(loader)
    next(made)
    first_batch = time.perf_counter() - began
    workers = [memory for batch in made for memory in batch if memory]
    main = Memory.of_this_process()
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return Run(
        imports=imports,
        first_batch=first_batch,
        main=main.rss / MB,
        peak=int(status["VmHWM"].split()[0]) * 1024 / MB,
        rss=max(worker.rss for worker in workers) / MB,
        pss=max(worker.pss for worker in workers) / MB,
        uss=max(worker.uss for worker in workers) / MB,
        together=(main.pss + sum(worker.pss for worker in workers)) / MB,
    )


# -- all runs -------------------------------------------------------------------------------------


def run(way: str, tree: Tree) -> Run:
    """Measure in a new process."""
    command = [sys.executable, "-m", "benchmarks.scale", "--way", way, "--tree", str(tree.root)]
    quiet = os.environ | {"PYTHONWARNINGS": "ignore"}
    result = subprocess.run(command, env=quiet, stdout=subprocess.PIPE, text=True, check=True)
    return Run(**json.loads(result.stdout.splitlines()[-1]))


def table(ways: Sequence[str], tree: Tree, control: Tree, repeats: int) -> str:
    without = {way: run(way, control) for way in ways}
    runs: dict[str, list[Run]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way in ways:
            runs[way].append(run(way, tree))
    rows = []
    for way, found in runs.items():
        of = {key: statistics.median(asdict(r)[key] for r in found) for key in asdict(found[0])}
        grew = [of[kind] - asdict(without[way])[kind] for kind in ("rss", "uss")]
        memory = [of["main"], of["peak"], of["rss"], of["pss"], of["uss"], *grew, of["together"]]
        rows.append([way, f"{of['first_batch']:.1f}", *(f"{value:.0f}" for value in memory)])
    imports = statistics.median(found.imports for each in runs.values() for found in each)
    note = f"\nBefore that, all of them import for {imports:.1f} s."
    return tabulate(rows, COLUMNS, tablefmt="github", disable_numparse=True) + note


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=1_000_000, help="unlabeled ones")
    parser.add_argument("--annotated", type=int, default=120_000, help="at most as many")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--tree", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.way:  # a process that run() started
        # From the start of the process, by the kernel's clock.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        imports = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        print(json.dumps(asdict(measure(args.way, Tree(args.tree, args.images), imports))))
        return
    print(environment())
    print(f"{WORKERS} loader workers, started by fork; medians of {args.repeats} runs")
    with tempfile.TemporaryDirectory(prefix="locreweight-scale-") as folder:
        tree = make_tree(Path(folder, "many"), args.images, args.annotated)
        control = make_tree(Path(folder, "control"), CONTROL, CONTROL)
        print(f"\n{args.images:,} unlabeled images\n")
        print(table(list(UNLABELED_WAYS), tree, control, args.repeats), flush=True)
        print(f"\n{args.annotated:,} annotated images\n")
        print(table(list(ANNOTATED_WAYS), tree, control, args.repeats), flush=True)


if __name__ == "__main__":
    main()
