#!/usr/bin/env python
"""How start-up and memory grow with the number of images, beside a plain list of dictionaries.

    python benchmarks/scale.py

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
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import detectron2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.datasets import load_coco_json
from PIL import Image
from tabulate import tabulate
from torch.utils.data import DataLoader, Dataset

from locreweight.config import load_config
from locreweight.data.mapper import ViewMapper
from locreweight.data.streams import Position, Stream, StreamDataset
from locreweight.data.training_sets import load_training_sets, register_datasets

WORKERS = 2
BATCH = 8
CONTROL = 1000  # images; what a worker takes with these is no growth
PER_FOLDER = 10_000
LINKS = 60_000  # to one file; ext4 allows 65,000
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


def environment() -> str:
    """The machine, threads and versions, in one line."""
    return (
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f}, {torch.get_num_threads()} torch threads, "
        f"Linux {platform.release()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, numpy {np.__version__}, Detectron2 {detectron2.__version__}"
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


# -- what is loaded -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A data set in the ways that a loader takes it: makes a sample, and looks up a record."""

    size: int
    sample: Callable[[int], Any]
    look_up: Callable[[int], dict]


@dataclass(frozen=True)
class Tree:
    """Images on the disk, and the files that name them."""

    root: Path
    size: int

    images = property(lambda self: self.root / "images")
    index = property(lambda self: self.root / "index.txt")
    annotations = property(lambda self: self.root / "annotations.json")
    few_images = property(lambda self: self.root / "few")
    few_annotations = property(lambda self: self.root / "few.json")


def config(**names: Sequence[str]) -> CfgNode:
    keys = {"MODEL.ROI_HEADS.NUM_CLASSES": 80, "DATASETS.TEST": (), "VIS_PERIOD": 0}
    keys |= {f"DATASETS.{key}": tuple(value) for key, value in names.items()}
    keys |= {"INPUT.MIN_SIZE_TRAIN": (32,), "DATASETS.CHECK_IMAGES": False}
    if not names.get("UNLABELED"):
        keys |= {"SEMI.BURN_IN_ITERS": 10, "SOLVER.MAX_ITER": 10}
    cfg = load_config("", [str(part) for pair in keys.items() for part in pair])
    register_datasets(cfg)
    return cfg


def of_stream(cfg: CfgNode, stream: Stream) -> Source:
    sets = load_training_sets(cfg)
    dataset = StreamDataset(sets.labeled, sets.unlabeled, ViewMapper(cfg), seed=1)
    size = len(sets.labeled if stream is Stream.LABELED else sets.unlabeled)
    return Source(
        size,
        lambda number: dataset[Position(stream, number)],
        lambda number: dataset.record(Position(stream, number)),
    )


def by_list_key(tree: Tree) -> Source:
    few = f"coco:{tree.few_annotations}:{tree.few_images}"
    cfg = config(TRAIN=[few], UNLABELED=[f"list:{tree.index}:{tree.images}"])
    return of_stream(cfg, Stream.UNLABELED)


def by_folder_key(tree: Tree) -> Source:
    few = f"coco:{tree.few_annotations}:{tree.few_images}"
    cfg = config(TRAIN=[few], UNLABELED=[f"folder:{tree.images}"])
    return of_stream(cfg, Stream.UNLABELED)


def by_coco_key(tree: Tree) -> Source:
    cfg = config(TRAIN=[f"coco:{tree.annotations}:{tree.images}"], UNLABELED=[])
    return of_stream(cfg, Stream.LABELED)


def of_records(records: list[dict], view: Callable[[dict], Any]) -> Source:
    """The plain way: the list itself is what the loader holds."""
    order = torch.randperm(len(records)).numpy()
    return Source(
        len(records),
        lambda number: view(records[order[number]]),
        lambda number: records[order[number]],
    )


def plain_from_index(tree: Tree) -> Source:
    names = tree.index.read_text().splitlines()
    paths = (os.path.join(tree.images, name) for name in names)
    records = [{"file_name": path, "image_id": i} for i, path in enumerate(paths)]
    return of_records(records, ViewMapper(config(TRAIN=[], UNLABELED=[])).unlabeled)


def plain_from_walk(tree: Tree) -> Source:
    found = (os.path.join(at, name) for at, _, names in os.walk(tree.images) for name in names)
    paths = sorted(path for path in found if path.endswith(".jpg") and os.path.isfile(path))
    records = [{"file_name": path, "image_id": i} for i, path in enumerate(paths)]
    return of_records(records, ViewMapper(config(TRAIN=[], UNLABELED=[])).unlabeled)


def plain_coco(tree: Tree) -> Source:
    records = load_coco_json(str(tree.annotations), str(tree.images))
    return of_records(records, ViewMapper(config(TRAIN=[], UNLABELED=[])).labeled)


UNLABELED_WAYS: dict[str, Callable[[Tree], Source]] = {
    "list of dicts, from an index": plain_from_index,
    "`list:`": by_list_key,
    "list of dicts, from os.walk": plain_from_walk,
    "`folder:`": by_folder_key,
}
ANNOTATED_WAYS: dict[str, Callable[[Tree], Source]] = {
    "list of dicts, by Detectron2": plain_coco,
    "`coco:`": by_coco_key,
}
WAYS = UNLABELED_WAYS | ANNOTATED_WAYS


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


def make_tree(root: Path, images: int, annotated: int) -> Tree:
    """Images of 32 x 32 pixels, an index of all and COCO annotations of the first ones."""
    tree = Tree(root, images)
    rng = np.random.default_rng(0)
    tree.few_images.mkdir(parents=True)
    few = [f"{i}.jpg" for i in range(2 + images // LINKS)]
    for name in few:
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tree.few_images / name)
    names = [f"{i // PER_FOLDER:04d}/{i:012d}.jpg" for i in range(images)]
    for folder in dict.fromkeys(os.path.dirname(name) for name in names):
        (tree.images / folder).mkdir(parents=True)
    for i, name in enumerate(names):
        os.link(tree.few_images / few[i // LINKS], tree.images / name)
    tree.index.write_text("".join(f"{name}\n" for name in names))
    tree.annotations.write_text(json.dumps(coco(names[:annotated])))
    tree.few_annotations.write_text(json.dumps(coco(few)))
    return tree


def coco(names: Sequence[str]) -> dict:
    """Like train2017: 7 boxes an image, each with a polygon of 20 numbers."""
    return {
        "images": [
            {"id": i, "file_name": name, "width": 32, "height": 32} for i, name in enumerate(names)
        ],
        "categories": [{"id": i, "name": f"class {i}"} for i in range(80)],
        "annotations": [
            {
                "id": 7 * i + k + 1,
                "image_id": i,
                "category_id": (i + k) % 80,
                "bbox": [k + 0.25, k + 0.5, 9.75 + k, 20.5],
                "area": 150.5,
                "iscrowd": 0,
                "segmentation": [[k + 0.25 + p for p in range(20)]],
            }
            for i in range(len(names))
            for k in range(7)
        ],
    }


def run(way: str, tree: Tree) -> Run:
    """Measure in a new process."""
    command = [sys.executable, __file__, "--way", way, "--tree", str(tree.root)]
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
