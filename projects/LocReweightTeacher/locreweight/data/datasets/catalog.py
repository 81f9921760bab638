"""Data sets named in the config by where they lie, without a line of Python.

======================================  ==========================================================
name                                    what it is
======================================  ==========================================================
``coco:<annotations.json>:<images>``    COCO json and the folder of its images
``voc:<folder>:<split>``                ``Annotations``, ``ImageSets/Main/<split>.txt``,
                                        ``JPEGImages``
``folder:<images>``                     images without annotations, at any depth; links are
                                        followed, each folder is read once
``list:<index.txt>:<images>``           the same, of those that a text file lists: in each line a
                                        path relative to the folder
anything else                           a data set that Detectron2 has registered
======================================  ==========================================================

Paths may start with ``$DETECTRON2_DATASETS`` or other variables. Boxes of records are xyxy or xywh
as each record says, in absolute pixels of the original image.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from functools import partial

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.pascal_voc import CLASS_NAMES as VOC_CLASSES

from ...errors import UsageError
from .coco import load_coco
from .image_folders import load_folder, load_list
from .voc import load_unlabeled_voc, load_voc


def register(
    names: Iterable[str],
    class_names: Iterable[str] = (),
    *,
    allow_outside: bool = False,
    labeled: bool = True,
) -> None:
    """Make every name known to Detectron2's catalogs; nothing is read but what a check needs.

    Args:
        names: as in the table above.
        class_names: of ``voc:`` data sets; VOC's twenty if empty.
        allow_outside: annotation files may name images outside of their image folder.
        labeled: annotations are needed; otherwise those of ``voc:`` may be missing or of any class.

    Raises:
        UsageError: for an unknown name, a missing file or folder, also of what Detectron2 has
            registered, a class name that is a path.
    """
    for name in names:
        kind, _, rest = str(name).partition(":")
        if name in DatasetCatalog.list():
            _need_registered(name)
            continue
        rest = expand_path(rest)
        if kind == "coco":
            parts = _two_parts(name, rest, "coco:<annotations.json>:<image folder>")
            _register_coco(name, *parts, allow_outside)
        elif kind == "voc":
            folder, split = _two_parts(name, rest, "voc:<folder>:<split>")
            classes = list(class_names) or list(VOC_CLASSES)
            read = load_voc if labeled else load_unlabeled_voc
            load_split = partial(read, folder, split, classes, allow_outside=allow_outside)
            _register_voc(name, folder, split, classes, load_split)
        elif kind == "folder":
            _need_folder(rest, name)
            DatasetCatalog.register(name, partial(load_folder, rest))
        elif kind == "list":
            list_file, folder = _two_parts(name, rest, "list:<index.txt>:<image folder>")
            _need_file(list_file, name)
            _need_folder(folder, name)
            load = partial(load_list, list_file, folder, allow_outside=allow_outside)
            DatasetCatalog.register(name, load)
        else:
            raise UsageError(
                f"unknown data set {name!r}. Name one that Detectron2 has registered, or say where "
                "it lies: coco:<annotations.json>:<image folder>, voc:<folder>:<split>, "
                "folder:<image folder>, list:<index.txt>:<image folder>"
            )


def registered_file(name: str) -> str:
    """The file that says which images a registered data set has; empty where there is none."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("dirname") and metadata.get("split"):
        return os.path.join(metadata.dirname, "ImageSets", "Main", f"{metadata.split}.txt")
    return metadata.get("json_file", "")


def _need_registered(name: str) -> None:
    """Detectron2 registers its data sets whether they are there or not."""
    file = registered_file(name)
    # Names of ours have a colon, and were looked for when they were registered.
    if not file or ":" in name or "://" in file or os.path.isfile(file):
        return
    raise UsageError(
        f"the file {file!r} of the data set {name!r} does not exist. Detectron2's own data sets "
        f"are looked for below the folder that the environment variable {DETECTRON2_DATASETS} "
        f"names, here {expand_path('$' + DETECTRON2_DATASETS)!r}: set it, put the data there, or name "
        "others in DATASETS.TRAIN, UNLABELED and TEST"
    )


def _two_parts(name: str, rest: str, form: str) -> tuple[str, str]:
    first, separator, second = rest.rpartition(":")
    if not (first and separator and second):
        raise UsageError(f"the data set name {name!r} is not of the form {form}")
    return first, second


def _need_folder(folder: str, name: str) -> None:
    if not os.path.isdir(folder):
        raise UsageError(f"the folder {folder!r} of the data set {name!r} does not exist")


def _need_file(file: str, name: str) -> None:
    if not os.path.isfile(file):
        raise UsageError(f"the file {file!r} of the data set {name!r} does not exist")


def _register_coco(name: str, json_file: str, image_folder: str, allow_outside: bool) -> None:
    _need_file(json_file, name)
    _need_folder(image_folder, name)
    load = partial(load_coco, name, json_file, image_folder, allow_outside=allow_outside)
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(image_root=image_folder, evaluator_type="coco")


def _register_voc(
    name: str, folder: str, split: str, class_names: list[str], load: Callable[[], list[dict]]
) -> None:
    for class_name in class_names:
        if not isinstance(class_name, str) or os.sep in class_name:
            # Detectron2's evaluator writes a file of that name.
            raise UsageError(f"DATASETS.CLASS_NAMES holds {class_name!r}, no text without '/'")
    _need_folder(folder, name)
    _need_file(os.path.join(folder, "ImageSets", "Main", f"{split}.txt"), name)
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        thing_classes=class_names,
        dirname=folder,
        split=split,
        year=2007,  # the 11-point metric
        evaluator_type="pascal_voc",
    )


# --------------------------------------------------------------------------------------------------
# Where data lies: variables in the names of data sets.


DETECTRON2_DATASETS = "DETECTRON2_DATASETS"


def expand_path(path: str) -> str:
    """A path with ``$VARIABLES`` and ``~`` filled in.

    ``$DETECTRON2_DATASETS``, where Detectron2 looks for the data sets that it has registered, is
    ``datasets`` if it is not set, as there. Other variables that are not set stay as they are, and
    an error that names the path will show them.
    """
    default = os.environ.get(DETECTRON2_DATASETS, "datasets")
    path = re.sub(
        rf"\$(?:{DETECTRON2_DATASETS}\b|{{{DETECTRON2_DATASETS}}})", lambda _: default, path
    )
    return os.path.expanduser(os.path.expandvars(path))
