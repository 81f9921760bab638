"""Readers of images without annotations: all images of a folder, or those that a file lists."""

from __future__ import annotations

import codecs
import logging
import os
from array import array
from collections.abc import Iterable, Iterator

import numpy as np

from ...errors import UsageError
from ...run_files import PANEL_FOLDER, is_run_folder
from .file_names import (
    IMAGE_SUFFIXES,
    ImageFinder,
    check_inside,
    describe_missing,
    is_companion,
    printable_name,
    read_text,
)
from .packed_records import ImageFiles

logger = logging.getLogger(__name__)

_NUM_SAMPLED = 100  # images of a list, of which at least one must exist


def load_folder(folder: str) -> ImageFiles:
    """List all images in a folder and its subfolders, sorted by path.

    Hidden files and folders, and the metadata that macOS adds to images, are left out.
    The output of training runs is left out: folders of runs, whatever they are called, and the
    pictures of a run whose ``OUTPUT_DIR`` is the folder itself.

    Raises:
        UsageError: if there is no image.
    """
    run_folders: list[str] = []
    images = ImageFiles.of(map(os.fsencode, sorted(image_paths(folder, run_folders))))
    if run_folders:
        logger.info(
            "left out %d folders of runs in the image folder %s, such as %s",
            len(run_folders),
            folder,
            printable_name(min(run_folders)),
        )
    if not images:
        suffixes = " ".join(sorted(IMAGE_SUFFIXES))
        raise UsageError(f"no image ({suffixes}) in the folder {folder}")
    return images


def load_list(list_file: str, folder: str, *, allow_outside: bool = False) -> ImageFiles:
    """Read the images that a text file lists, in its order. The folder is not searched.

    Args:
        list_file: one path per line, relative to ``folder``. Blank lines are ignored, and lines may
            have Windows line ends. Everything else belongs to the name, which can be any bytes.
        folder: folder of the images.
        allow_outside: paths may lead out of the folder.

    If no name of a sample exists, as in lists made on Windows, names may differ from those on the
    disk as described in :class:`.ImageFinder`.

    Raises:
        UsageError: if the file cannot be read, is empty, lists an image twice, or if none of a
            sample of its images exists. Training skips single images that are missing.
    """
    hashes = array("q")  # the names themselves would take the memory that packing saves

    def checked_names() -> Iterator[bytes]:
        for name in _read_names(list_file):
            if name.startswith(b"/") or b".." in name or b"\0" in name:
                check_inside(os.fsdecode(name), list_file, folder, allow_outside=allow_outside)
            hashes.append(hash(name))
            yield name

    try:
        images = ImageFiles.of(checked_names(), below=folder)
        _check_unique(list_file, hashes)
    except OSError as error:
        raise UsageError(f"the list {list_file!r} cannot be read: {error.strerror}") from error
    if not images:
        raise UsageError(f"{list_file} lists no image")
    if not _some_exist(images):
        images = _find_similar(list_file, folder, allow_outside)
    if not _some_exist(images):
        raise UsageError(
            f"none of {len(_sample(images))} sampled images of {list_file} exists, such as "
            f"{describe_missing(images[0]['file_name'])}: paths must be relative to the image "
            "folder"
        )
    return images


def _find_similar(list_file: str, folder: str, allow_outside: bool) -> ImageFiles:
    finder = ImageFinder(list_file, folder, allow_outside=allow_outside)
    names = [os.fsdecode(name) for name in _read_names(list_file)]
    return ImageFiles.of(map(os.fsencode, finder.find_all(names)))


def _read_names(list_file: str) -> Iterator[bytes]:
    for line in _read_lines(list_file):
        name = line.rstrip(b"\r\n")
        is_companion_of_macos = name.rpartition(b"/")[2].startswith(b"._") or b"__MACOSX/" in name
        if name and not name.isspace() and not is_companion_of_macos:
            yield name


def _read_lines(list_file: str) -> Iterator[bytes]:
    with open(list_file, "rb") as lines:
        first = next(lines, b"")
        if first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            yield from map(os.fsencode, read_text(list_file).splitlines())
            return
        yield first.removeprefix(codecs.BOM_UTF8)
        yield from lines


def _check_unique(list_file: str, hashes: Iterable[int]) -> None:
    ordered = np.sort(np.array(hashes, np.int64))
    repeated_hashes = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    candidates: set[bytes] = set()
    for name in _read_names(list_file) if repeated_hashes else ():
        if name in candidates:
            raise UsageError(
                f"{list_file} lists {printable_name(os.fsdecode(name))} more than once; remove "
                "repeated lines, for example with `sort -u`"
            )
        if hash(name) in repeated_hashes:
            candidates.add(name)


def _sample(images: ImageFiles) -> list[int]:
    return np.linspace(0, len(images) - 1, min(len(images), _NUM_SAMPLED)).astype(int).tolist()


def _some_exist(images: ImageFiles) -> bool:
    return any(os.path.lexists(images[i]["file_name"]) for i in _sample(images))


def image_paths(folder: str, run_folders: list[str] | None = None) -> Iterator[str]:
    """Yield image paths in an order that does not depend on the disk, sorted in each folder.

    File types come from the directory listing. Asking the disk for each file would take long with a
    million images, above all over a network.

    Args:
        folder: the folder to search.
        run_folders: the folders of runs that were left out are appended here.
    """
    run_folders = [] if run_folders is None else run_folders
    visited = set()
    pending = [(folder, os.path.realpath(folder))]
    while pending:
        parent, real = pending.pop()
        if real in visited:  # links can form cycles
            continue
        visited.add(real)
        folders, images, is_run = _list_folder(parent)
        start = os.path.join(parent, "")
        if is_run and parent != folder:
            run_folders.append(parent)
            continue
        if is_run:
            run_folders += [start + name for name, _ in folders if name == PANEL_FOLDER]
            folders = [entry for entry in folders if entry[0] != PANEL_FOLDER]
        yield from (start + name for name in sorted(images))
        # Depth first, in order of names: this decides which of several paths to a folder is used.
        for name, is_link in sorted(folders, reverse=True):
            path = start + name
            pending.append((path, os.path.realpath(path) if is_link else os.path.join(real, name)))


def _list_folder(folder: str) -> tuple[list[tuple[str, bool]], list[str], bool]:
    """Subfolders, each with whether it is a link; images; and whether this is the folder of a run.

    Without permission to list the folder, it counts as empty.
    """
    folders, images, others = [], [], set()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_companion(entry.name):
                    others.add(entry.name)
                elif _is_folder(entry):
                    folders.append((entry.name, entry.is_symlink()))
                elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES and _is_image(entry):
                    images.append(entry.name)
                else:
                    others.add(entry.name)
    except OSError:
        return [], [], False
    return folders, images, is_run_folder(others)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_image(entry: os.DirEntry) -> bool:
    # Reading a pipe or device would never end. A broken link counts as an image that is missing.
    if entry.is_symlink():
        return os.path.isfile(entry.path) or not os.path.exists(entry.path)
    return entry.is_file(follow_symlinks=False)
