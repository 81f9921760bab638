"""Registration of data sets that the config names by their location.

======================================  ==========================================================
name                                    data set
======================================  ==========================================================
``coco:<annotations.json>:<images>``    COCO json and the folder of its images
``voc:<folder>:<split>``                Pascal VOC: ``Annotations``, ``JPEGImages`` and
                                        ``ImageSets/Main/<split>.txt``
``voc:<folder>``                        Pascal VOC's xml files beside the images
``yolo:<data.yaml>:<split>``            Ultralytics' layout; the split ``train`` may be left out
``yolo:<images>:<labels>``              the same without a yaml file
``labelme:<folder>``                    LabelMe's json files beside the images
``folder:<images>``                     all images in a folder and its subfolders, without
                                        annotations; symbolic links are followed
``list:<index.txt>:<images>``           the images that a text file lists, without annotations; each
                                        line is a path relative to the folder
``shards:<index.json>``                 images in tar shards, without annotations; a path, or a URL
                                        of object storage. ``tools/make_shards.py`` writes them
any other name                          a data set that is registered in Detectron2
======================================  ==========================================================

Paths may contain environment variables, ``~`` and colons. Boxes of records are xyxy or xywh, as
each record's ``bbox_mode`` says, in absolute pixels of the original image.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.pascal_voc import CLASS_NAMES as VOC_CLASSES

from ...errors import UsageError
from .coco import load_coco
from .image_folders import load_folder, load_list
from .labelme import load_labelme
from .packed_records import ImageFiles
from .real_paths import RealPathCache
from .record_cache import NO_CACHE, RecordCache
from .shard_cache import DEFAULT_CACHE_DIR, ShardCache, is_local
from .shards import load_shards
from .voc import load_voc, load_voc_folder, load_voc_images, split_file
from .yolo import YAML_SUFFIXES, load_yolo, open_folders, open_yaml

logger = logging.getLogger(__name__)

DETECTRON2_DATASETS = "DETECTRON2_DATASETS"
# Without a config, which has its own folder and size.
DEFAULT_SHARD_CACHE = ShardCache(Path(os.path.expanduser(DEFAULT_CACHE_DIR)), 50 * 10**9)

# Reads the records of a data set, and the metadata that Detectron2 keeps of it.
Loader = Callable[[], Sequence[dict]]
Source = tuple[Loader, dict[str, Any]]


@dataclass(frozen=True)
class ReadOptions:
    """How data sets are read.

    Attributes:
        class_names: classes of data sets that do not list their own, in the order of the model.
        allow_outside: annotation files may name images outside of their image folder.
        labeled: annotations are required. Otherwise they may be missing or of any class.
        cache: of parsed annotation files.
        shard_cache: of remote shards.
    """

    class_names: tuple[str, ...] = ()
    allow_outside: bool = False
    labeled: bool = True
    cache: RecordCache = NO_CACHE
    shard_cache: ShardCache = DEFAULT_SHARD_CACHE


@dataclass(frozen=True)
class DatasetFormat:
    """A kind of data set that a name can refer to.

    Attributes:
        form: the form of such a name, for messages.
        open: ``(name, location, options)``; checks that the files exist, without reading them.
    """

    form: str
    open: Callable[[str, str, ReadOptions], Source]


def register(
    names: Iterable[str],
    class_names: Iterable[str] = (),
    *,
    allow_outside: bool = False,
    labeled: bool = True,
    cache: RecordCache = NO_CACHE,
    shard_cache: ShardCache = DEFAULT_SHARD_CACHE,
) -> None:
    """Register data sets in Detectron2's catalogs. Their records are read when they are asked for.

    Args:
        names: see the table above.
        class_names, allow_outside, labeled, cache, shard_cache: see :class:`ReadOptions`.

    Raises:
        UsageError: for an unknown name, a missing file or folder, or a class name with a slash.
    """
    options = ReadOptions(tuple(class_names), allow_outside, labeled, cache, shard_cache)
    for name in names:
        if name in DatasetCatalog.list():
            _check_registered(name)
            continue
        kind, _, location = str(name).partition(":")
        if kind not in FORMATS:
            forms = ", ".join(known.form for known in FORMATS.values())
            raise UsageError(
                f"unknown data set {name!r}. Use a name registered in Detectron2, or one of {forms}"
            )
        load, metadata = FORMATS[kind].open(name, expand_path(location), options)
        DatasetCatalog.register(name, load)
        MetadataCatalog.get(name).set(**metadata)


def expand_path(path: str) -> str:
    """Replace environment variables and ``~`` in a path.

    ``$DETECTRON2_DATASETS``, the folder of Detectron2's data sets, defaults to ``datasets``.
    Other variables that are not set stay in the path.
    """
    default = os.environ.get(DETECTRON2_DATASETS, "datasets")
    path = re.sub(
        rf"\$(?:{DETECTRON2_DATASETS}\b|{{{DETECTRON2_DATASETS}}})", lambda _: default, path
    )
    return os.path.expanduser(os.path.expandvars(path))


def with_unannotated_images(name: str, records: Sequence[dict]) -> Sequence[dict]:
    """Add the images of ``labelme:<folder>`` or ``voc:<folder>`` that have no annotations.

    Args:
        name: a registered data set. Those of other formats are returned unchanged.
        records: all records of the data set.

    Returns:
        ``records``, and records without ``annotations`` of the other images in the folder.
    """
    folder = MetadataCatalog.get(name).get("annotated_folder")
    if not folder or isinstance(records, ImageFiles):
        return records
    real_path = RealPathCache()
    annotated = {real_path(record["file_name"]) for record in records}
    # The indices of a folder's images could be image ids of annotations.
    return [*records] + [
        {**image, "image_id": image["file_name"]}
        for image in load_folder(folder)
        if real_path(image["file_name"]) not in annotated
    ]


def index_file(name: str) -> str:
    """The file that lists the images of a registered data set; empty if there is none."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("dirname") and metadata.get("split"):
        return split_file(metadata.dirname, metadata.split)
    return metadata.get("json_file", "")


# -- formats ---------------------------------------------------------------------------------------


def _open_coco(name: str, location: str, options: ReadOptions) -> Source:
    json_file, image_folder = split_paths(name, location)
    _check_file(json_file, name)
    _check_folder(image_folder, name)
    load = partial(
        load_coco,
        name,
        json_file,
        image_folder,
        allow_outside=options.allow_outside,
        labeled=options.labeled,
        cache=options.cache,
    )
    return load, {"image_root": image_folder, "evaluator_type": "coco"}


def _open_voc(name: str, location: str, options: ReadOptions) -> Source:
    if os.path.isdir(location) or ":" not in location:
        _check_folder(location, name)
        return _open_annotated_folder(name, location, options, load_voc_folder)
    folder, split = _splits(name, location)[0]
    class_names = list(options.class_names) or list(VOC_CLASSES)
    for class_name in class_names:
        if not isinstance(class_name, str) or os.sep in class_name:
            # Detectron2's VOC evaluator writes a file with this name.
            raise UsageError(
                f"DATASETS.CLASS_NAMES contains {class_name!r}: use a text without '/'"
            )
    _check_folder(folder, name)
    _check_file(split_file(folder, split), name)
    outside = options.allow_outside
    load = partial(load_voc, folder, split, class_names, allow_outside=outside)
    load_images = partial(load_voc_images, folder, split, allow_outside=outside)
    return _with_optional_labels(load, load_images, options), {
        "thing_classes": class_names,
        "dirname": folder,
        "split": split,
        "year": 2007,  # selects the 11-point metric
        "evaluator_type": "pascal_voc",
    }


def _open_labelme(name: str, location: str, options: ReadOptions) -> Source:
    _check_folder(location, name)
    return _open_annotated_folder(name, location, options, load_labelme)


def _open_annotated_folder(
    name: str,
    folder: str,
    options: ReadOptions,
    read: Callable[[str, Sequence[str]], tuple[list[dict], list[str]]],
) -> Source:
    """A folder whose images have their annotations beside them."""

    def load() -> Sequence[dict]:
        records, class_names = read(folder, options.class_names)
        MetadataCatalog.get(name).set(thing_classes=class_names)
        return records

    metadata = {"image_root": folder, "annotated_folder": folder, "evaluator_type": "coco"}
    return _with_optional_labels(load, partial(load_folder, folder), options), metadata


def _open_yolo(name: str, location: str, options: ReadOptions) -> Source:
    first, _, second = location.rpartition(":")
    if location.endswith(YAML_SUFFIXES):
        first, second = location, "train"
    elif not (first.endswith(YAML_SUFFIXES) and second):
        first, second = split_paths(name, location)
    if first.endswith(YAML_SUFFIXES):
        _check_file(first, name)
        outside = options.allow_outside
        source = partial(open_yaml, first, second, options.class_names, allow_outside=outside)
    else:
        _check_folder(first, name)
        _check_folder(second, name)
        source = partial(open_folders, first, second, options.class_names)

    def load() -> Sequence[dict]:
        opened = source()
        MetadataCatalog.get(name).set(thing_classes=opened.class_names)
        return load_yolo(opened)

    def load_images() -> ImageFiles:
        return ImageFiles.of(map(os.fsencode, source().images))

    return _with_optional_labels(load, load_images, options), {"evaluator_type": "coco"}


def _with_optional_labels(load: Loader, load_images: Loader, options: ReadOptions) -> Loader:
    """Use only the images of an unlabeled data set whose annotations cannot be read."""

    def load_unlabeled() -> Sequence[dict]:
        try:
            return load()
        except UsageError as error:
            logger.info("the annotations of unlabeled images are not used: %s", error)
            return load_images()

    return load if options.labeled else load_unlabeled


def _open_folder(name: str, location: str, options: ReadOptions) -> Source:
    _check_folder(location, name)
    return partial(load_folder, location), {}


def _open_list(name: str, location: str, options: ReadOptions) -> Source:
    list_file, folder = split_paths(name, location)
    _check_file(list_file, name)
    _check_folder(folder, name)
    return partial(load_list, list_file, folder, allow_outside=options.allow_outside), {}


def _open_shards(name: str, location: str, options: ReadOptions) -> Source:
    if options.labeled:
        raise UsageError(f"{name} has no annotations: use it in DATASETS.UNLABELED")
    if is_local(location):
        _check_file(location, name)
    return partial(load_shards, location, options.shard_cache), {}


FORMATS = {
    "coco": DatasetFormat("coco:<annotations.json>:<image folder>", _open_coco),
    "voc": DatasetFormat("voc:<folder>:<split> or voc:<folder>", _open_voc),
    "yolo": DatasetFormat("yolo:<data.yaml>:<split> or yolo:<images>:<labels>", _open_yolo),
    "labelme": DatasetFormat("labelme:<folder>", _open_labelme),
    "folder": DatasetFormat("folder:<image folder>", _open_folder),
    "list": DatasetFormat("list:<index.txt>:<image folder>", _open_list),
    "shards": DatasetFormat("shards:<index.json>", _open_shards),
}


def split_paths(name: str, location: str) -> tuple[str, str]:
    """Split the location of a data set at the colon between two paths.

    If the paths have colons as well, they are those that exist.

    Args:
        name: of the data set, for messages.
        location: the name without the format and with expanded variables.

    Raises:
        UsageError: if there is no such colon.
    """
    return max(_splits(name, location), key=lambda paths: [*map(os.path.exists, paths)])


def _splits(name: str, location: str) -> list[tuple[str, str]]:
    """The parts before and behind each colon; those of the last colon come first."""
    colons = [i for i, letter in enumerate(location) if letter == ":"]
    splits = [(location[:i], location[i + 1 :]) for i in reversed(colons)]
    if not splits or not all(splits[0]):
        form = FORMATS[name.partition(":")[0]].form
        raise UsageError(f"the data set name {name!r} does not have the form {form}")
    return [split for split in splits if all(split)]


def _check_registered(name: str) -> None:
    """Check that a data set exists: Detectron2 registers its own whether they exist or not."""
    file = index_file(name)
    # Names with a colon were checked when they were registered.
    if not file or ":" in name or "://" in file or os.path.isfile(file):
        return
    folder = expand_path("$" + DETECTRON2_DATASETS)
    raise UsageError(
        f"the file {file!r} of the data set {name!r} does not exist. Detectron2's data sets are "
        f"expected below the folder in the environment variable {DETECTRON2_DATASETS}, now "
        f"{folder!r}: set the variable, put the data there, or use other data sets in "
        "DATASETS.TRAIN, UNLABELED and TEST"
    )


def _check_folder(folder: str, name: str) -> None:
    if not os.path.isdir(folder):
        raise UsageError(f"the folder {folder!r} of the data set {name!r} does not exist")


def _check_file(file: str, name: str) -> None:
    if not os.path.isfile(file):
        raise UsageError(f"the file {file!r} of the data set {name!r} does not exist")
