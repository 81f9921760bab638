"""Images without annotations: all of a folder, or those that a text file lists."""

from __future__ import annotations

import codecs
import os
from array import array
from collections.abc import Iterable, Iterator

import numpy as np

from ..errors import UsageError
from .file_names import check_inside, shown
from .image_files import ImageFiles

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
_LOOKED_FOR = 100  # images of a list of which at least one has to be there


def load_folder(folder: str) -> ImageFiles:
    """Records of all images in a folder, at any depth, in order of their names.

    Raises:
        UsageError: if there is none.
    """
    images = ImageFiles.of(map(os.fsencode, sorted(_image_paths(folder))))
    if not images:
        suffixes = " ".join(sorted(IMAGE_SUFFIXES))
        raise UsageError(f"no image ({suffixes}) in the folder {folder}")
    return images


def load_list(list_file: str, folder: str, *, allow_outside: bool = False) -> ImageFiles:
    """Records of the images that a text file lists, in its order, without going through the folder.

    Args:
        list_file: a path in each line, relative to ``folder``. Blank lines are passed over; lines
            may end as on Windows. Everything else belongs to the name, which may be any bytes.
        folder: of the images.
        allow_outside: paths may lead out of that folder.

    Raises:
        UsageError: if the file cannot be read, lists nothing or an image twice, or if none of some
            images that are looked for is there. Single ones that are missing are left to training,
            which skips them.
    """
    hashes = array("q")  # and not the names, which would fill the memory that packing them saves

    def checked() -> Iterator[bytes]:
        for name in _listed(list_file):
            if name.startswith(b"/") or b".." in name or b"\0" in name:
                check_inside(os.fsdecode(name), list_file, folder, allow_outside=allow_outside)
            hashes.append(hash(name))
            yield name

    try:
        images = ImageFiles.of(checked(), below=folder)
        _check_listed_once(list_file, hashes)
    except OSError as error:
        raise UsageError(f"the list {list_file!r} cannot be read: {error.strerror}") from error
    if not images:
        raise UsageError(f"{list_file} lists no image")
    _check_some_exist(images, list_file)
    return images


def _listed(list_file: str) -> Iterator[bytes]:
    with open(list_file, "rb") as lines:
        for number, line in enumerate(lines):
            name = line.rstrip(b"\r\n")
            if number == 0:
                name = name.removeprefix(codecs.BOM_UTF8)
            if name and not name.isspace():
                yield name


def _check_listed_once(list_file: str, hashes: Iterable[int]) -> None:
    found = np.sort(np.array(hashes, np.int64))
    suspects = set(found[1:][found[1:] == found[:-1]].tolist())
    seen: set[bytes] = set()
    for name in _listed(list_file) if suspects else ():
        if name in seen:
            raise UsageError(
                f"{list_file} lists {shown(os.fsdecode(name))} more than once; `sort -u` keeps one"
            )
        if hash(name) in suspects:
            seen.add(name)


def _check_some_exist(images: ImageFiles, list_file: str) -> None:
    some = np.linspace(0, len(images) - 1, min(len(images), _LOOKED_FOR)).astype(int)
    if not any(os.path.lexists(images[i]["file_name"]) for i in some.tolist()):
        raise UsageError(
            f"none of {len(some)} images that {list_file} lists is there, such as "
            f"{shown(images[0]['file_name'])}: its paths are to be relative to the image folder"
        )


def _image_paths(folder: str) -> Iterator[str]:
    """Paths in an order that does not depend on the disk, sorted in each folder.

    What the disk says of an entry while it lists a folder is enough, but of links: to ask about
    each image takes long for a million of them, and far longer over a network.
    """
    visited = set()
    pending = [(folder, os.path.realpath(folder))]
    while pending:
        parent, real = pending.pop()
        if real in visited:  # links can lead in circles
            continue
        visited.add(real)
        folders, images = _sorted_out(parent)
        start = os.path.join(parent, "")
        yield from (start + name for name in sorted(images))
        # Depth first in order of names: it decides which of several ways to a folder is taken.
        for name, is_link in sorted(folders, reverse=True):
            path = start + name
            pending.append((path, os.path.realpath(path) if is_link else os.path.join(real, name)))


def _sorted_out(folder: str) -> tuple[list[tuple[str, bool]], list[str]]:
    """Folders, and whether each is a link, and images of a folder; nothing of one closed to us."""
    folders, images = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
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
    # Of pipes and devices reading would never end; a link to nowhere is an image missing.
    if entry.is_symlink():
        return os.path.isfile(entry.path) or not os.path.exists(entry.path)
    return entry.is_file(follow_symlinks=False)
