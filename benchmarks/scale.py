#!/usr/bin/env python
"""Start-up time and memory with a million images, compared with a plain list of dicts.

    python -m benchmarks.scale

A million unlabeled and 120,000 annotated images are loaded in each way that DATASETS accepts, and
as a Python list of dicts in PyTorch's DataLoader with the same mapper. Each run is a new process
with two forked loader workers. Runs of different kinds alternate, and the table shows medians. The
images are hard links to a few small files in a temporary folder of about 150 MB, which is removed
at the end. Creating it takes a minute.

The time is from the config, or the list, to the first batch, without imports. The memory is read
from smaps_rollup after each worker has read every record once in random order, as in an epoch. RSS
counts all pages of a process, USS its private pages, PSS its private pages and its share of the
others. The growth of a worker is the difference from the same run with 1,000 images.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.datasets import load_coco_json
from PIL import Image
from tabulate import tabulate
from torch.utils.data import DataLoader, Dataset

from benchmarks.timing import environment
from locreweight.command_line import HelpFormatter
from locreweight.config import load_config
from locreweight.data.loader import Stream, StreamDataset, StreamPosition
from locreweight.data.mapper import ViewMapper
from locreweight.data.training_sets import load_training_sets, register_datasets

WORKERS = 2
BATCH = 8
CONTROL_IMAGES = 1000
MB = 1e6
COLUMNS = (
    "dataset",
    "first batch, s",
    "main: RSS, MB",
    "main: peak, MB",
    "worker: RSS, MB",
    "PSS",
    "USS",
    "worker growth: RSS, MB",
    "USS",
    "all: PSS, MB",
)
IMAGES_PER_FOLDER = 10_000
MAX_LINKS = 60_000  # hard links to one file; ext4 allows 65,000


# Image files and annotations


@dataclass(frozen=True)
class Files:
    """Images on disk, and the files that list or annotate them."""

    root: Path
    size: int

    images = property(lambda self: self.root / "images")
    index = property(lambda self: self.root / "index.txt")
    annotations = property(lambda self: self.root / "annotations.json")
    output = property(lambda self: self.root / "output")  # of training, for the cache
    few_images = property(lambda self: self.root / "few")
    few_annotations = property(lambda self: self.root / "few.json")


def write_files(root: Path, images: int, annotated: int) -> Files:
    """Write images of 32 x 32 pixels, a list of all, and COCO annotations of the first ones."""
    files = Files(root, images)
    rng = np.random.default_rng(0)
    files.few_images.mkdir(parents=True)
    few = [f"{i}.jpg" for i in range(2 + images // MAX_LINKS)]
    for name in few:
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(files.few_images / name)
    names = [f"{i // IMAGES_PER_FOLDER:04d}/{i:012d}.jpg" for i in range(images)]
    for folder in dict.fromkeys(os.path.dirname(name) for name in names):
        (files.images / folder).mkdir(parents=True)
    for i, name in enumerate(names):
        os.link(files.few_images / few[i // MAX_LINKS], files.images / name)
    files.index.write_text("".join(f"{name}\n" for name in names))
    files.annotations.write_text(json.dumps(coco_annotations(names[:annotated])))
    files.few_annotations.write_text(json.dumps(coco_annotations(few)))
    return files


def coco_annotations(names: Sequence[str]) -> dict:
    """Make annotations like train2017's: 7 boxes per image, each with a polygon of 20 numbers."""
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


# Datasets in each way


@dataclass(frozen=True)
class Source:
    """A dataset: its size, and functions that make a sample and return a record by index."""

    size: int
    sample: Callable[[int], Any]
    record: Callable[[int], dict]


def build_config(output: Path | None = None, **datasets: Sequence[str]) -> CfgNode:
    keys: dict[str, Any] = {
        "MODEL.ROI_HEADS.NUM_CLASSES": 80,
        "DATASETS.TEST": (),
        "VIS_PERIOD": 0,
    }
    if output:
        keys["OUTPUT_DIR"] = output
    keys |= {f"DATASETS.{key}": tuple(value) for key, value in datasets.items()}
    keys |= {"INPUT.MIN_SIZE_TRAIN": (32,), "DATASETS.CHECKS.DECODE_IMAGES": False}
    if not datasets.get("UNLABELED"):
        keys |= {"SEMI.BURN_IN_ITERS": 10, "SOLVER.MAX_ITER": 10}
    cfg = load_config("", [str(part) for pair in keys.items() for part in pair])
    register_datasets(cfg)
    return cfg


def stream_source(cfg: CfgNode, stream: Stream) -> Source:
    sets = load_training_sets(cfg)
    dataset = StreamDataset(sets.labeled, sets.unlabeled, ViewMapper(cfg), seed=1)
    return Source(
        len(sets.labeled if stream is Stream.LABELED else sets.unlabeled),
        lambda index: dataset[StreamPosition(stream, index)],
        lambda index: dataset.record(StreamPosition(stream, index)),
    )


def list_source(records: list[dict], make_sample: Callable[[dict], Any]) -> Source:
    """The plain way: the loader holds the list of records."""
    order = torch.randperm(len(records)).numpy()
    return Source(
        len(records),
        lambda index: make_sample(records[order[index]]),
        lambda index: records[order[index]],
    )


def unlabeled_key(files: Files, dataset: str) -> Source:
    few = f"coco:{files.few_annotations}:{files.few_images}"
    return stream_source(build_config(TRAIN=[few], UNLABELED=[dataset]), Stream.UNLABELED)


def coco_key(files: Files) -> Source:
    train = [f"coco:{files.annotations}:{files.images}"]
    cfg = build_config(files.output, TRAIN=train, UNLABELED=[])
    return stream_source(cfg, Stream.LABELED)


def coco_key_first(files: Files) -> Source:
    shutil.rmtree(files.output, ignore_errors=True)
    files.output.mkdir()
    return coco_key(files)


def plain_unlabeled(paths: Sequence[str]) -> Source:
    records = [{"file_name": path, "image_id": i} for i, path in enumerate(paths)]
    return list_source(records, ViewMapper(build_config(TRAIN=[], UNLABELED=[])).unlabeled)


def plain_index(files: Files) -> Source:
    names = files.index.read_text().splitlines()
    return plain_unlabeled([os.path.join(files.images, name) for name in names])


def plain_walk(files: Files) -> Source:
    found = (os.path.join(at, name) for at, _, names in os.walk(files.images) for name in names)
    return plain_unlabeled(
        sorted(path for path in found if path.endswith(".jpg") and os.path.isfile(path))
    )


def plain_coco(files: Files) -> Source:
    records = load_coco_json(str(files.annotations), str(files.images))
    return list_source(records, ViewMapper(build_config(TRAIN=[], UNLABELED=[])).labeled)


UNLABELED_SOURCES: dict[str, Callable[[Files], Source]] = {
    "list of dicts, from an index": plain_index,
    "`list:`": lambda files: unlabeled_key(files, f"list:{files.index}:{files.images}"),
    "list of dicts, from os.walk": plain_walk,
    "`folder:`": lambda files: unlabeled_key(files, f"folder:{files.images}"),
}
ANNOTATED_SOURCES: dict[str, Callable[[Files], Source]] = {
    "list of dicts, by Detectron2": plain_coco,
    "`coco:`, first start": coco_key_first,
    "`coco:`, next start, from the cache": coco_key,
}
SOURCES = UNLABELED_SOURCES | ANNOTATED_SOURCES


# One run, in a new process


@dataclass(frozen=True)
class Memory:
    """Memory of a process, in bytes."""

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
    """Result of one run: times in seconds and memory in MB, for a worker the larger of two."""

    imports: float
    first_batch: float
    main: float
    peak: float
    rss: float
    pss: float
    uss: float
    all_processes: float


_READ_ALL = -1  # instead of an index: read all records and return the memory of the worker


class Samples(Dataset):
    """The samples of a source, and the memory of a worker after it has read all records."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __getitem__(self, index: int) -> Memory | None:
        if index != _READ_ALL:
            self._source.sample(index)
            return None
        for i in range(self._source.size):
            pickle.dumps(self._source.record(i))  # touches all of a record, as mappers do
        return Memory.of_this_process()


def batches() -> Iterator[list[int]]:
    """Yield a batch for each worker, then all records for each worker."""
    yield from ([BATCH * i + k for k in range(BATCH)] for i in range(WORKERS))
    yield from ([_READ_ALL] for _ in range(WORKERS))


def measure(source: str, files: Files, imports: float) -> Run:
    start = time.perf_counter()
    samples = Samples(SOURCES[source](files))
    loader = DataLoader(
        samples,
        batch_sampler=list(batches()),
        num_workers=WORKERS,
        collate_fn=list,
        multiprocessing_context="fork",
    )
    results = iter(loader)
    next(results)
    first_batch = time.perf_counter() - start
    workers = [memory for batch in results for memory in batch if memory]
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
        all_processes=(main.pss + sum(worker.pss for worker in workers)) / MB,
    )


def measure_in_subprocess(source: str, files: Files) -> Run:
    command = [sys.executable, "-m", "benchmarks.scale"]
    command += ["--source", source, "--folder", str(files.root)]
    environ = os.environ | {"PYTHONWARNINGS": "ignore"}
    result = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True)
    return Run(**json.loads(result.stdout.splitlines()[-1]))


# All runs


def table(sources: Sequence[str], files: Files, control: Files, repeats: int) -> str:
    """Measure all sources and format the table."""
    controls = {source: measure_in_subprocess(source, control) for source in sources}
    runs: dict[str, list[Run]] = {source: [] for source in sources}
    for _ in range(repeats):
        for source in sources:
            runs[source].append(measure_in_subprocess(source, files))
    rows = []
    for source, results in runs.items():
        median = {
            key: statistics.median(asdict(run)[key] for run in results)
            for key in asdict(results[0])
        }
        growth = [median[kind] - asdict(controls[source])[kind] for kind in ("rss", "uss")]
        memory = [median[key] for key in ("main", "peak", "rss", "pss", "uss")]
        values = [*memory, *growth, median["all_processes"]]
        rows.append([source, f"{median['first_batch']:.1f}", *(f"{v:.0f}" for v in values)])
    imports = statistics.median(run.imports for results in runs.values() for run in results)
    note = f"\nImports before that take {imports:.1f} s in all of them."
    return tabulate(rows, COLUMNS, tablefmt="github", disable_numparse=True) + note


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--images", type=int, default=1_000_000, help="number of unlabeled images")
    parser.add_argument(
        "--annotated",
        type=int,
        default=120_000,
        help="number of annotated images, at most --images",
    )
    parser.add_argument("--repeats", type=int, default=3, help="number of repetitions")
    # For measure_in_subprocess:
    parser.add_argument("--source", choices=SOURCES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.source:
        # The kernel knows when this process was started, before its imports.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        imports = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        run = measure(args.source, Files(args.folder, args.images), imports)
        print(json.dumps(asdict(run)))
        return
    print(environment())
    print(f"{WORKERS} loader workers, started by fork; medians of {args.repeats} runs")
    with tempfile.TemporaryDirectory(prefix="locreweight-scale-") as folder:
        files = write_files(Path(folder, "many"), args.images, args.annotated)
        control = write_files(Path(folder, "control"), CONTROL_IMAGES, CONTROL_IMAGES)
        print(f"\n{args.images:,} unlabeled images\n")
        print(table(list(UNLABELED_SOURCES), files, control, args.repeats), flush=True)
        print(f"\n{args.annotated:,} annotated images\n")
        print(table(list(ANNOTATED_SOURCES), files, control, args.repeats), flush=True)


if __name__ == "__main__":
    main()
