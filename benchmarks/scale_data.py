"""The data sets that benchmarks/scale.py measures, and the ways in which they are held."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.datasets import load_coco_json
from PIL import Image

from locreweight.config import load_config
from locreweight.data.loader import Stream, StreamDataset, StreamPosition
from locreweight.data.mapper import ViewMapper
from locreweight.data.training_sets import load_training_sets, register_datasets

PER_FOLDER = 10_000
LINKS = 60_000  # to one file; ext4 allows 65,000


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
    keys |= {"INPUT.MIN_SIZE_TRAIN": (32,), "DATASETS.CHECKS.DECODE_IMAGES": False}
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
        lambda number: dataset[StreamPosition(stream, number)],
        lambda number: dataset.record(StreamPosition(stream, number)),
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


# -- on the disk ----------------------------------------------------------------------------------


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
