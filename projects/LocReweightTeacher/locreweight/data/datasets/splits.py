"""Which images of annotated sets are labeled: drawn anew, or read from a file.

A file of this project (``datasets/make_split.py`` writes it) names images by their ids, and knows
the annotation files that it was made for::

    {"nested": true,
     "sets": [{"annotations": "instances_train2017.json", "sha256": "...", "images": 118287,
               "labeled": {"10.0": {"1": [9, 25, ...]}}}]}

with percent -> seed -> ids. ``nested``: of one seed a smaller percentage is a subset of a larger
one. The file ``COCO_supervision.txt`` that Unbiased Teacher published can be used as well; see
:func:`_by_positions`.
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
from .catalog import expand_path, registered_file

logger = logging.getLogger(__name__)

Records = list[dict]


def split_annotated(cfg: CfgNode, annotated: dict[str, Records]) -> tuple[Records, Records]:
    """Labeled images, and the others, by ``DATASETS.LABELED_PERCENT`` and ``DATASETS.SPLIT_SEED``.

    Args:
        cfg: says as well whether the split is drawn, or read from ``DATASETS.SPLIT_FILE``.
        annotated: name of a data set -> all its records.

    Raises:
        UsageError: for a percentage or seed that cannot be, a file that is broken, lacks that
            split, or was made for other annotations.
    """
    percent, seed = cfg.DATASETS.LABELED_PERCENT, cfg.DATASETS.SPLIT_SEED
    if cfg.DATASETS.SPLIT_FILE:
        return _split_by_file(expand_path(cfg.DATASETS.SPLIT_FILE), annotated, percent, seed)
    records = _joined(annotated)
    labeled, rest = _drawn(len(records), percent, seed)
    return [records[i] for i in labeled], [records[i] for i in rest]


def check_split_is_there(cfg: CfgNode) -> None:
    """Look up the split that a run will use in ``DATASETS.SPLIT_FILE``, if one is named.

    Its ids are compared with the annotations only when these are read.

    Raises:
        UsageError: for a file that is broken or lacks that split.
    """
    if not cfg.DATASETS.SPLIT_FILE:
        return
    file = expand_path(cfg.DATASETS.SPLIT_FILE)
    content = _read(file)
    with _broken(file):
        by_ids = "sets" in content
        for splits in [entry["labeled"] for entry in content["sets"]] if by_ids else [content]:
            _chosen(file, splits, cfg.DATASETS.LABELED_PERCENT, cfg.DATASETS.SPLIT_SEED)


def write_split_file(
    file: Path, annotated: dict[str, Records], percents: Iterable[float], seeds: Iterable[int]
) -> None:
    """Draw splits, all of them as :func:`split_annotated` draws them, and write them down.

    Args:
        file: to be written; its folder is made.
        annotated: name of a data set -> all its records.
        percents, seeds: each percentage is drawn with each seed.

    Raises:
        UsageError: for a percentage or seed that cannot be, no images, a data set without an
            annotation file, or a file that cannot be written.
    """
    ids = [(name, record["image_id"]) for name, records in annotated.items() for record in records]
    if not ids:
        raise UsageError("there are no images to draw from: name data sets in DATASETS.TRAIN")
    sets = {name: _description(name, len(records)) for name, records in annotated.items()}
    for percent, seed in ((float(p), s) for p in percents for s in seeds):
        for entry in sets.values():
            entry["labeled"].setdefault(str(percent), {})[str(seed)] = []
        for name, image_id in (ids[i] for i in _drawn(len(ids), percent, seed)[0]):
            sets[name]["labeled"][str(percent)][str(seed)].append(image_id)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"nested": True, "sets": list(sets.values())}) + "\n")
    except OSError as error:
        raise UsageError(f"cannot write {file}: {error.strerror}") from error


def annotation_file(name: str) -> Path:
    """The file that says which images a data set has, and for COCO all of its boxes.

    Raises:
        UsageError: for a data set that is neither COCO nor Pascal VOC.
    """
    kind, _, rest = name.partition(":")
    if kind == "coco":
        return Path(expand_path(rest).rpartition(":")[0])
    if file := registered_file(name):
        return Path(file)
    raise UsageError(
        f"{name} has no annotation file to tie a split to: DATASETS.SPLIT_FILE needs COCO json or "
        "Pascal VOC"
    )


def _joined(annotated: dict[str, Records]) -> Records:
    return [record for records in annotated.values() for record in records]


def _drawn(size: int, percent: float, seed: int) -> tuple[list[int], list[int]]:
    if not 0 <= seed < 2**32:  # what numpy takes
        raise UsageError(f"DATASETS.SPLIT_SEED must lie in [0, 2**32), got {seed}")
    try:
        return split_indices(size, percent, seed)
    except ValueError as error:
        raise UsageError(f"DATASETS.LABELED_PERCENT: {error}") from error


def _description(name: str, images: int) -> dict[str, Any]:
    file = annotation_file(name)
    return {"annotations": file.name, "sha256": _sha256(file), "images": images, "labeled": {}}


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _split_by_file(
    file: str, annotated: dict[str, Records], percent: float, seed: int
) -> tuple[Records, Records]:
    content = _read(file)
    with _broken(file):
        if "sets" in content:
            return _by_ids(file, content["sets"], annotated, percent, seed)
        return _by_positions(file, content, _joined(annotated), percent, seed)


def _read(file: str) -> dict[str, Any]:
    try:
        return json.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read DATASETS.SPLIT_FILE {file!r}: {error}") from error


@contextlib.contextmanager
def _broken(file: str) -> Iterator[None]:
    """Whatever goes wrong with the content of a file has the file named."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(
            f"DATASETS.SPLIT_FILE {file!r} is no file of splits ({type(error).__name__}: {error}); "
            "datasets/make_split.py writes one"
        ) from error


def _by_ids(
    file: str, sets: list[dict], annotated: dict[str, Records], percent: float, seed: int
) -> tuple[Records, Records]:
    if len(sets) != len(annotated):
        raise UsageError(
            f"DATASETS.SPLIT_FILE {file!r} is of {len(sets)} data sets, DATASETS.TRAIN names "
            f"{len(annotated)}"
        )
    labeled: Records = []
    rest: Records = []
    for entry, (name, records) in zip(sets, annotated.items(), strict=True):
        _check_same_annotations(file, entry, name, len(records))
        chosen = _chosen(file, entry["labeled"], percent, seed)
        wanted = set(chosen)
        if len(wanted) < len(chosen):
            raise UsageError(
                f"DATASETS.SPLIT_FILE {file!r} names {len(chosen) - len(wanted)} images of {name} "
                "more than once; write it anew with datasets/make_split.py"
            )
        missing = wanted - {record["image_id"] for record in records}
        if missing:
            raise UsageError(
                f"DATASETS.SPLIT_FILE {file!r} names {len(missing)} images that {name} lacks, such "
                f"as {min(missing, key=str)!r}; write it anew with datasets/make_split.py"
            )
        for record in records:
            (labeled if record["image_id"] in wanted else rest).append(record)
    return labeled, rest


def _check_same_annotations(file: str, entry: dict, name: str, images: int) -> None:
    source = annotation_file(name)
    expected, found = entry["sha256"], _sha256(source)
    if expected != found:
        raise UsageError(
            f"DATASETS.SPLIT_FILE {file!r} was made for {entry['annotations']} with the SHA-256 "
            f"{expected}, {source} has {found}: use the same annotations, or write the split anew "
            "with datasets/make_split.py"
        )
    if entry["images"] != images:
        raise UsageError(
            f"DATASETS.SPLIT_FILE {file!r} is of {entry['images']} images, {name} has {images}"
        )


def _chosen(file: str, splits: dict[str, dict[str, list]], percent: float, seed: int) -> list:
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


def _by_positions(
    file: str, splits: dict, records: Records, percent: float, seed: int
) -> tuple[Records, Records]:
    """Unbiased Teacher's format: percent -> seed -> positions, without a checksum.

    They are positions in the list that Detectron2 makes of COCO's train2017: ordered by image id,
    without the images that have no object or crowds only (117266 of 118287 remain). Those belong
    to neither part there, so they are left out here. The number of positions, the percentage of
    the list's length rounded down, tells other annotations from these.
    """
    chosen = _chosen(file, splits, percent, seed)
    with_objects = filter_images_with_only_crowd_annotations(records)
    expected = int(percent / 100 * len(with_objects))
    positions = set(chosen)
    if len(chosen) != expected or len(positions) != expected:
        raise UsageError(
            f"DATASETS.SPLIT_FILE {file!r} has {len(chosen)} images as {percent:g} %, but of the "
            f"{len(with_objects)} images with objects here {expected} would be: it was made for "
            "other annotations (COCO's train2017 has 117266 such images)"
        )
    if positions and not (0 <= min(positions) and max(positions) < len(with_objects)):
        raise UsageError(
            f"DATASETS.SPLIT_FILE {file!r} names positions up to {max(positions)}, there are "
            f"{len(with_objects)} images with objects"
        )
    logger.info(
        "split of %s: %d images without objects are left out",
        file,
        len(records) - len(with_objects),
    )
    labeled = [record for i, record in enumerate(with_objects) if i in positions]
    rest = [record for i, record in enumerate(with_objects) if i not in positions]
    return labeled, rest


# --------------------------------------------------------------------------------------------------
# Which images of a fully annotated set are used with their labels.


def split_indices(size: int, labeled_percent: float, seed: int) -> tuple[list[int], list[int]]:
    """Draw the labeled images of a data set, without replacement.

    The draw depends on the arguments alone: it is the same in every process, on every machine and
    in every run. It is nested: a smaller percentage takes a subset of what a larger one takes.

    Args:
        size: number of images.
        labeled_percent: in (0, 100]; at least one image is drawn.
        seed: which of the possible draws.

    Returns:
        indices of the labeled images and of the others, both in order.

    Raises:
        ValueError: for a percentage outside of (0, 100].
    """
    if not 0 < labeled_percent <= 100:
        raise ValueError(f"labeled_percent must lie in (0, 100], got {labeled_percent}")
    count = max(1, round(size * labeled_percent / 100))
    # numpy's old generator: its numbers are promised to stay the same in all later versions.
    order = np.random.RandomState(seed).permutation(size)
    return sorted(order[:count].tolist()), sorted(order[count:].tolist())
