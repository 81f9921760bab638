"""Split of annotated data sets into labeled and unlabeled images.

A split is drawn from a seed, or read from ``DATASETS.SPLIT_FILE``. A file written by
``datasets/make_split.py`` lists image ids and the annotation files that it belongs to::

    {"nested": true,
     "sets": [{"annotations": "instances_train2017.json", "sha256": "...", "images": 118287,
               "labeled": {"10.0": {"1": [9, 25, ...]}}}]}

with percent -> seed -> image ids. ``nested`` says that for the same seed, a smaller percentage is a
subset of a larger one. Unbiased Teacher's ``COCO_supervision.txt`` can be used as well, see
:func:`_split_by_positions`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data.build import filter_images_with_only_crowd_annotations

from ...errors import UsageError
from ...file_io import atomic_write_bytes, sha256_of
from .catalog import expand_path, index_file, split_paths

logger = logging.getLogger(__name__)

Records = list[dict]


def split_annotated(cfg: CfgNode, annotated: dict[str, Records]) -> tuple[Records, Records]:
    """Split records by ``DATASETS.LABELED_PERCENT``, ``SPLIT_SEED`` and ``SPLIT_FILE``.

    Args:
        cfg: the config.
        annotated: name of a data set -> all its records.

    Returns:
        labeled records, and the others.

    Raises:
        UsageError: for an invalid percentage or seed, or a split file that is malformed, lacks the
            split, or was made for other annotations.
    """
    percent, seed = cfg.DATASETS.LABELED_PERCENT, cfg.DATASETS.SPLIT_SEED
    if cfg.DATASETS.SPLIT_FILE:
        return _split_by_file(expand_path(cfg.DATASETS.SPLIT_FILE), annotated, percent, seed)
    records = _concatenate(annotated)
    labeled, rest = _draw_split(len(records), percent, seed)
    return [records[i] for i in labeled], [records[i] for i in rest]


def check_split_exists(cfg: CfgNode) -> None:
    """Check that ``DATASETS.SPLIT_FILE``, if set, has the split that the config selects.

    Image ids are compared with the annotations later, when these are read.

    Raises:
        UsageError: if the file is malformed or lacks the split.
    """
    if not cfg.DATASETS.SPLIT_FILE:
        return
    file = expand_path(cfg.DATASETS.SPLIT_FILE)
    content = _read_split_file(file)
    with _malformed_file_errors(file):
        by_ids = "sets" in content
        for splits in [entry["labeled"] for entry in content["sets"]] if by_ids else [content]:
            _select_split(file, splits, cfg.DATASETS.LABELED_PERCENT, cfg.DATASETS.SPLIT_SEED)


def write_split_file(
    file: Path, annotated: dict[str, Records], percents: Iterable[float], seeds: Iterable[int]
) -> None:
    """Draw splits in the same way as :func:`split_annotated` and write them to a file.

    Args:
        file: file to write; its folder is created.
        annotated: name of a data set -> all its records.
        percents, seeds: a split is drawn for each percentage with each seed.

    Raises:
        UsageError: for an invalid percentage or seed, no images, a data set without an annotation
            file, or a file that cannot be written.
    """
    records = _concatenate(annotated)
    if not records:
        raise UsageError("there are no images to split: set DATASETS.TRAIN")
    drawn = {
        (float(percent), seed): _draw_split(len(records), float(percent), seed)[0]
        for percent in percents
        for seed in seeds
    }
    _write_splits(file, annotated, drawn)


def write_chosen_split(
    file: Path, annotated: dict[str, Records], labeled: Iterable[int], percent: float, seed: int
) -> None:
    """Write a split whose labeled images were chosen in another way than at random.

    Args:
        file: file to write; its folder is created.
        annotated: name of a data set -> all its records.
        labeled: positions of the labeled images among the records of all data sets.
        percent, seed: select the split in the config.

    Raises:
        UsageError: for a data set without an annotation file, or a file that cannot be written.
    """
    _write_splits(file, annotated, {(float(percent), seed): sorted(labeled)})


def _write_splits(
    file: Path, annotated: dict[str, Records], splits: dict[tuple[float, int], list[int]]
) -> None:
    ids = [(name, record["image_id"]) for name, records in annotated.items() for record in records]
    sets = {name: _describe(name, records) for name, records in annotated.items()}
    for (percent, seed), labeled in splits.items():
        for entry in sets.values():
            entry["labeled"].setdefault(str(percent), {})[str(seed)] = []
        for name, image_id in (ids[i] for i in labeled):
            sets[name]["labeled"][str(percent)][str(seed)].append(image_id)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"nested": True, "sets": list(sets.values())}) + "\n"
        atomic_write_bytes(file, content.encode())
    except OSError as error:
        raise UsageError(f"cannot write {file}: {error.strerror}") from error


def annotation_file(name: str) -> Path | None:
    """The file that defines the images of a data set and, for COCO, their boxes.

    None for data sets with an annotation file for each image.
    """
    kind, _, location = name.partition(":")
    if kind == "coco":
        return Path(split_paths(name, expand_path(location))[0])
    file = index_file(name)
    return Path(file) if file else None


def split_indices(size: int, labeled_percent: float, seed: int) -> tuple[list[int], list[int]]:
    """Draw the labeled images of a data set, without replacement.

    The result depends only on the arguments: it is the same in every process, run and machine. It
    is nested: a smaller percentage gives a subset of a larger one.

    Args:
        size: number of images.
        labeled_percent: in (0, 100]; at least one image is drawn.
        seed: seed of the draw.

    Returns:
        sorted indices of the labeled images, and of the others.

    Raises:
        ValueError: if the percentage is not in (0, 100].
    """
    if not 0 < labeled_percent <= 100:
        raise ValueError(f"labeled_percent must be in (0, 100], got {labeled_percent}")
    count = max(1, round(size * labeled_percent / 100))
    # numpy guarantees that RandomState gives the same numbers in all versions.
    order = np.random.RandomState(seed).permutation(size)
    return sorted(order[:count].tolist()), sorted(order[count:].tolist())


def _concatenate(annotated: dict[str, Records]) -> Records:
    return [record for records in annotated.values() for record in records]


def _draw_split(size: int, percent: float, seed: int) -> tuple[list[int], list[int]]:
    if not 0 <= seed < 2**32:  # the range of numpy's seeds
        raise UsageError(f"DATASETS.SPLIT_SEED must be in [0, 2**32), got {seed}")
    try:
        return split_indices(size, percent, seed)
    except ValueError as error:
        raise UsageError(f"DATASETS.LABELED_PERCENT: {error}") from error


def _describe(name: str, records: Records) -> dict[str, Any]:
    source, digest = _annotation_digest(name, records)
    return {
        "annotations": Path(source).name,
        "sha256": digest,
        "images": len(records),
        "labeled": {},
    }


def _annotation_digest(name: str, records: Records) -> tuple[str, str]:
    """What defines the images of a data set, and its SHA-256.

    It is the annotation file, or else what was read of the annotation files of all images.

    Raises:
        UsageError: if the data set has no annotations.
    """
    if file := annotation_file(name):
        return str(file), sha256_of(file)
    if not any("annotations" in record for record in records):
        raise UsageError(
            f"{name} has no annotations, which DATASETS.SPLIT_FILE needs: use an annotated data set"
        )
    digest = hashlib.sha256()
    for record in records:
        boxes = [[a["category_id"], *map(float, a["bbox"])] for a in record.get("annotations", [])]
        digest.update(json.dumps([record["image_id"], boxes]).encode())
    return name, digest.hexdigest()


# -- split files -----------------------------------------------------------------------------------


def _split_by_file(
    file: str, annotated: dict[str, Records], percent: float, seed: int
) -> tuple[Records, Records]:
    content = _read_split_file(file)
    with _malformed_file_errors(file):
        if "sets" in content:
            return _split_by_ids(file, content["sets"], annotated, percent, seed)
        return _split_by_positions(file, content, _concatenate(annotated), percent, seed)


def _read_split_file(file: str) -> dict[str, Any]:
    try:
        return json.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read DATASETS.SPLIT_FILE {file!r}: {error}") from error


@contextlib.contextmanager
def _malformed_file_errors(file: str) -> Iterator[None]:
    """Convert errors caused by the content of a split file to UsageErrors that name the file."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(
            f"DATASETS.SPLIT_FILE {file!r} is not a split file ({type(error).__name__}: {error}); "
            "write one with datasets/make_split.py"
        ) from error


def _split_by_ids(
    file: str, sets: list[dict], annotated: dict[str, Records], percent: float, seed: int
) -> tuple[Records, Records]:
    if len(sets) != len(annotated):
        raise UsageError(
            f"DATASETS.SPLIT_FILE {file!r} is of {len(sets)} data sets, DATASETS.TRAIN has "
            f"{len(annotated)}"
        )
    labeled: Records = []
    rest: Records = []
    for entry, (name, records) in zip(sets, annotated.items(), strict=True):
        _check_same_annotations(file, entry, name, records)
        ids = _select_split(file, entry["labeled"], percent, seed)
        unique = set(ids)
        if len(unique) < len(ids):
            raise UsageError(
                f"DATASETS.SPLIT_FILE {file!r} lists {len(ids) - len(unique)} images of {name} "
                "more than once; write it again with datasets/make_split.py"
            )
        missing = unique - {record["image_id"] for record in records}
        if missing:
            raise UsageError(
                f"DATASETS.SPLIT_FILE {file!r} lists {len(missing)} images that {name} lacks, such "
                f"as {min(missing, key=str)!r}; write it again with datasets/make_split.py"
            )
        for record in records:
            (labeled if record["image_id"] in unique else rest).append(record)
    return labeled, rest


def _check_same_annotations(file: str, entry: dict, name: str, records: Records) -> None:
    images = len(records)
    expected = entry["sha256"]
    source, actual = _annotation_digest(name, records)
    if expected != actual:
        raise UsageError(
            f"DATASETS.SPLIT_FILE {file!r} was made for {entry['annotations']} with the SHA-256 "
            f"{expected}, but {source} has {actual}: use the same annotations, or write the split "
            "again with datasets/make_split.py"
        )
    if entry["images"] != images:
        raise UsageError(
            f"DATASETS.SPLIT_FILE {file!r} is of {entry['images']} images, {name} has {images}"
        )


def _select_split(file: str, splits: dict[str, dict[str, list]], percent: float, seed: int) -> list:
    by_percent = {float(key): value for key, value in splits.items()}
    if percent not in by_percent:
        known = ", ".join(f"{key:g}" for key in sorted(by_percent))
        raise UsageError(
            f"DATASETS.SPLIT_FILE {file!r} has no split of {percent:g} %; set "
            f"DATASETS.LABELED_PERCENT to one of {known}"
        )
    if str(seed) not in by_percent[percent]:
        raise UsageError(
            f"DATASETS.SPLIT_FILE {file!r} has no split of seed {seed}; set DATASETS.SPLIT_SEED to "
            f"one of {', '.join(by_percent[percent])}"
        )
    return by_percent[percent][str(seed)]


def _split_by_positions(
    file: str, splits: dict, records: Records, percent: float, seed: int
) -> tuple[Records, Records]:
    """Unbiased Teacher's format: percent -> seed -> positions, without a checksum.

    Positions refer to the list that Detectron2 makes of COCO's train2017: sorted by image id,
    without images that have no object or only crowds (117266 of 118287 remain). Unbiased Teacher
    uses these images in neither part, and so does this function. The number of positions, which is
    the percentage of the list's length rounded down, shows whether the annotations are the same.
    """
    positions = _select_split(file, splits, percent, seed)
    with_objects = filter_images_with_only_crowd_annotations(records)
    expected = int(percent / 100 * len(with_objects))
    unique = set(positions)
    if len(positions) != expected or len(unique) != expected:
        raise UsageError(
            f"DATASETS.SPLIT_FILE {file!r} has {len(positions)} images for {percent:g} %, but "
            f"{percent:g} % of the {len(with_objects)} images with objects are {expected}: it was "
            "made for other annotations (COCO's train2017 has 117266 such images)"
        )
    if unique and not (0 <= min(unique) and max(unique) < len(with_objects)):
        raise UsageError(
            f"DATASETS.SPLIT_FILE {file!r} lists positions up to {max(unique)}, but there are "
            f"{len(with_objects)} images with objects"
        )
    logger.info(
        "split file %s: left out %d images without objects",
        file,
        len(records) - len(with_objects),
    )
    labeled = [record for i, record in enumerate(with_objects) if i in unique]
    rest = [record for i, record in enumerate(with_objects) if i not in unique]
    return labeled, rest
