"""Images without annotations: all of a folder, or those that a text file lists."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator

import numpy as np

from ..errors import UsageError
from .file_names import check_inside, shown
from .packed import ImageFiles

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
_LOOKED_FOR = 100  # of the images of a list, whether at least one of so many is there


def load_folder(folder: str) -> ImageFiles:
    """Records of all images in a folder, at any depth, in order of their names.

    Raises:
        UsageError: if there is none.
    """
    images = ImageFiles(sorted(_image_paths(folder)))
    if not images:
        suffixes = " ".join(sorted(IMAGE_SUFFIXES))
        raise UsageError(f"no image ({suffixes}) in the folder {folder}")
    return images


def load_list(list_file: str, folder: str, *, allow_outside: bool = False) -> ImageFiles:
    """Records of the images that a text file lists, in its order; the folder is not gone through.

    Args:
        list_file: a path in each line, relative to ``folder``. Blank lines are passed over; lines
            may end as on Windows. Everything else belongs to the name, which may be any bytes.
        folder: of the images.
        allow_outside: paths may lead out of that folder.

    Raises:
        UsageError: if the file cannot be read, lists nothing, names an image twice, or none of
            some images is there. Single ones that are missing are left to training, which skips
            them.
    """
    try:
        with open(list_file, "rb") as lines:
            names = (os.fsdecode(name) for name in _listed(lines))
            images = ImageFiles(_inside(names, list_file, folder, allow_outside))
    except OSError as error:
        raise UsageError(f"the list {list_file!r} cannot be read: {error.strerror}") from error
    if not images:
        raise UsageError(f"{list_file} lists no image")
    _check_listed_once(images, list_file)
    _check_some_exist(images, list_file)
    return images


def _listed(lines: Iterator[bytes]) -> Iterator[bytes]:
    for number, line in enumerate(lines):
        if number == 0:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            yield line.removesuffix(b"\n").removesuffix(b"\r")


def _inside(
    names: Iterator[str], list_file: str, folder: str, allow_outside: bool
) -> Iterator[str]:
    for name in names:
        check_inside(name, list_file, folder, allow_outside=allow_outside)
        yield os.path.join(folder, name)


def _check_listed_once(images: ImageFiles, list_file: str) -> None:
    # Numbers instead of names, which would fill the memory that packing them saves.
    keys = np.fromiter((hash(x["file_name"]) for x in images), np.int64, len(images))
    keys.sort()
    repeated = set(keys[1:][keys[1:] == keys[:-1]].tolist())
    if not repeated:
        return
    seen: set[str] = set()
    for name in (x["file_name"] for x in images if hash(x["file_name"]) in repeated):
        if name in seen:
            raise UsageError(
                f"{list_file} lists {shown(name)} more than once; `sort -u` leaves it in once"
            )
        seen.add(name)


def _check_some_exist(images: ImageFiles, list_file: str) -> None:
    some = np.linspace(0, len(images) - 1, min(len(images), _LOOKED_FOR)).astype(int)
    if not any(os.path.lexists(images[i]["file_name"]) for i in some.tolist()):
        raise UsageError(
            f"none of {len(some)} images of {list_file} is there, such as "
            f"{shown(images[0]['file_name'])}: its paths are to be relative to the image folder"
        )


def _image_paths(folder: str) -> Iterator[str]:
    """Each folder, depth first and in order of names, and what lies in it, in any order.

    What the disk says of an entry while it is listed is enough, but of links: a call for each image
    takes minutes for a million of them, and far longer over a network.
    """
    visited = set()
    pending = [(folder, os.path.realpath(folder))]
    while pending:
        parent, real = pending.pop()
        if real in visited:  # links can lead in circles
            continue
        visited.add(real)
        folders, images = _sorted_out(parent)
        yield from (os.path.join(parent, name) for name in images)
        # Which of several ways to a folder is taken must not depend on the disk.
        for name, is_link in sorted(folders, reverse=True):
            path = os.path.join(parent, name)
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
