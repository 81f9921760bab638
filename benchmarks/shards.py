#!/usr/bin/env python
"""Images in tar shards: reading speed compared with files, and an index of 100 million images.

    python -m benchmarks.shards

Reading: one thread reads and decodes the same JPEGs, in the order of training, from a folder and
from local shards. Rounds alternate, and the table shows medians of CPU time and of elapsed time;
the files are in the disk cache.

Index: a synthetic one, without the shards that it lists. A new process loads it and takes records
in the order of training. Memory is the growth of anonymous pages. Pages of the file of blocks are
not among them: all processes share them, and the system can drop them at any time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tabulate import tabulate

from benchmarks.scale import MB, Memory
from benchmarks.timing import environment
from locreweight.command_line import HelpFormatter
from locreweight.data.datasets.image_folders import load_folder
from locreweight.data.datasets.shard_cache import ShardCache
from locreweight.data.datasets.shard_writer import write_shards
from locreweight.data.datasets.shards import BLOCK_TYPE, load_shards
from locreweight.data.image_io import SizeLimit, read_for_training

IMAGES = 1000
IMAGES_PER_SHARD = 100
PER_INDEXED_SHARD = 2000
RECORDS = 20_000


def write_images(folder: Path) -> None:
    """Write JPEGs of 640 x 480 pixels with a smooth random pattern."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(IMAGES):
        coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{i:05d}.jpg")


def reading_speed(folder: Path, repeats: int) -> str:
    write_images(folder / "images")
    index = write_shards(folder / "images", folder / "shards", IMAGES_PER_SHARD)
    loose = load_folder(str(folder / "images"))
    shards = load_shards(str(index), ShardCache(folder / "cache", 10**9))
    order = [shards.index_at((1, 1, 0), i) for i in range(IMAGES)]
    seconds: dict[str, list[tuple[float, float]]] = {"loose files": [], "shards": []}
    for _ in range(repeats + 1):
        for name, images in (("loose files", loose), ("shards", shards)):
            cpu, wall = time.process_time(), time.perf_counter()
            for i in order:
                read_for_training(images[i]["file_name"], SizeLimit())
            seconds[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    rows = []
    for name, rounds in seconds.items():
        cpu, wall = (statistics.median(values) for values in zip(*rounds[1:], strict=True))
        rows.append([name, f"{IMAGES / cpu:.0f}", f"{IMAGES / wall:.0f}"])
    columns = ["", "images per second of CPU", "images per second"]
    return tabulate(rows, columns, tablefmt="github", disable_numparse=True)


def write_index(folder: Path, images: int) -> Path:
    """Write a synthetic index."""
    shards = -(-images // PER_INDEXED_SHARD)
    entries = [
        {
            "url": f"s3://bucket/shard-{i:06d}.tar",
            "nsamples": min(PER_INDEXED_SHARD, images - i * PER_INDEXED_SHARD),
            "filesize": 300_000_000,
            "sha256": f"{i:064x}",
        }
        for i in range(shards)
    ]
    blocks = np.resize(np.arange(PER_INDEXED_SHARD, dtype=BLOCK_TYPE) * 300, images)
    blocks.tofile(folder / "index.blocks")
    index = folder / "index.json"
    content = {"shardlist": entries, "blocks": {"url": "index.blocks", "sha256": "-"}}
    index.write_text(json.dumps(content))
    return index


def load_index(index: Path) -> None:
    """Measure in this process, and print the results as json."""
    before = Memory.of_this_process().anonymous
    start = time.perf_counter()
    cache = ShardCache(index.parent / "cache", 10**9)
    cache.prefetch = lambda files: None  # type: ignore[method-assign]
    shards = load_shards(str(index), cache)
    shards[shards.index_at((1, 1, 0), 0)]
    first = time.perf_counter() - start
    positions: Sequence[int] = np.linspace(0, len(shards) - 1, RECORDS).astype(int).tolist()
    start = time.perf_counter()
    for position in positions:
        shards[shards.index_at((1, 1, 0), position)]
    far = (time.perf_counter() - start) / RECORDS
    start = time.perf_counter()
    for position in range(RECORDS):
        shards[shards.index_at((1, 1, 0), position)]
    near = (time.perf_counter() - start) / RECORDS
    growth = (Memory.of_this_process().anonymous - before) / MB
    print(json.dumps([first, 1e6 * near, 1e6 * far, growth]))


def index_of(folder: Path, images: int, repeats: int) -> str:
    index = write_index(folder, images)
    size = sum(file.stat().st_size for file in folder.glob("index.*")) / MB
    command = [sys.executable, "-m", "benchmarks.shards", "--index", str(index)]
    runs = []
    for _ in range(repeats):
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        runs.append(json.loads(result.stdout.splitlines()[-1]))
    first, near, far, growth = (statistics.median(values) for values in zip(*runs, strict=True))
    row = [f"{images:,}", f"{size:.0f}", f"{first:.2f}", f"{near:.0f}", f"{far:.0f}"]
    columns = ["images", "index, MB", "first record, s", "next record, us", "any record, us"]
    return tabulate(
        [[*row, f"{growth:.0f}"]],
        [*columns, "memory, MB"],
        tablefmt="github",
        disable_numparse=True,
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--images", type=int, default=100_000_000, help="images of the index")
    parser.add_argument("--repeats", type=int, default=5, help="number of repetitions")
    parser.add_argument("--index", type=Path, help=argparse.SUPPRESS)  # for index_of
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.index:
        load_index(args.index)
        return
    print(environment())
    with tempfile.TemporaryDirectory(prefix="locreweight-shards-") as folder:
        print(f"\n{IMAGES} JPEGs of 640 x 480 pixels\n")
        print(reading_speed(Path(folder), args.repeats), flush=True)
        print(f"\nindex of {args.images:,} images\n")
        print(index_of(Path(folder), args.images, args.repeats))


if __name__ == "__main__":
    main()
