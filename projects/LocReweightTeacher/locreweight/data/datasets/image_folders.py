"""Readers of images without annotations: all images of a folder, or those that a file lists."""

from __future__ import annotations

import codecs
import os
from array import array
from collections.abc import Iterable, Iterator

import numpy as np

from ...errors import UsageError
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

_NUM_SAMPLED = 100  # images of a list, of which at least one must exist


def load_folder(folder: str) -> ImageFiles:
    """List all images in a folder and its subfolders, sorted by path.

    Hidden files and folders, and the metadata that macOS adds to images, are passed over.

    Raises:
        UsageError: if there is no image.
    """
    images = ImageFiles.of(map(os.fsencode, sorted(image_paths(folder))))
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


def image_paths(folder: str) -> Iterator[str]:
    """Yield image paths in an order that does not depend on the disk, sorted in each folder.

    File types come from the directory listing. Asking the disk for each file would take long with a
    million images, above all over a network.
    """
    visited = set()
    pending = [(folder, os.path.realpath(folder))]
    while pending:
        parent, real = pending.pop()
        if real in visited:  # links can form cycles
            continue
        visited.add(real)
        folders, images = _list_folder(parent)
        start = os.path.join(parent, "")
        yield from (start + name for name in sorted(images))
        # Depth first, in order of names: this decides which of several paths to a folder is used.
        for name, is_link in sorted(folders, reverse=True):
            path = start + name
            pending.append((path, os.path.realpath(path) if is_link else os.path.join(real, name)))


def _list_folder(folder: str) -> tuple[list[tuple[str, bool]], list[str]]:
    """Subfolders, each with whether it is a link, and images; both empty if not permitted."""
    folders, images = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_companion(entry.name):
                    continue
                if _is_folder(entry):
                    folders.append((entry.name, entry.is_symlink()))
                elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES and _is_image(entry):
                    images.append(entry.name)
    except OSError:
        return [], []
    return folders, images


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
