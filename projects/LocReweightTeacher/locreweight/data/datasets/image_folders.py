"""Images without annotations: all of a folder, or those that a text file lists."""

from __future__ import annotations

import codecs
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

import numpy as np
import torch

from ...errors import UsageError
from .file_names import check_inside, printable_name
from .packed_records import Packed, PackedBytes, tensor_of

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
                f"{list_file} lists {printable_name(os.fsdecode(name))} more than once; `sort -u` keeps one"
            )
        if hash(name) in suspects:
            seen.add(name)


def _check_some_exist(images: ImageFiles, list_file: str) -> None:
    some = np.linspace(0, len(images) - 1, min(len(images), _LOOKED_FOR)).astype(int)
    if not any(os.path.lexists(images[i]["file_name"]) for i in some.tolist()):
        raise UsageError(
            f"none of {len(some)} images that {list_file} lists is there, such as "
            f"{printable_name(images[0]['file_name'])}: its paths are to be relative to the image folder"
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


# --------------------------------------------------------------------------------------------------
# The files of images without annotations, millions of them.


class ImageFiles(Packed):
    """Records of images without annotations: ``file_name``, and ``image_id``, the place in here.

    A folder that many images lie in is held once. Apart from folders an image takes 13 bytes and
    its name.
    """

    def __init__(self, folders: PackedBytes, folder_of: torch.Tensor, names: PackedBytes) -> None:
        """
        Args:
            folders: with ``/`` at the end, or empty.
            folder_of: ``(N,)`` int32, the folder of each image.
            names: of the N images in their folders, each with a zero byte behind it.
        """
        self._folders = folders
        self._folder_of = folder_of
        self._names = names

    @classmethod
    def of(cls, paths: Iterable[bytes], below: str = "") -> ImageFiles:
        """Pack paths.

        Args:
            paths: as :func:`os.fsencode` makes them; no two need to be in memory at once.
            below: what relative ones are relative to.
        """
        folders: dict[bytes, int] = {}
        folder_of = array("i")

        def names() -> Iterator[bytes]:
            for path in paths:
                folder, slash, name = path.rpartition(b"/")
                folder_of.append(folders.setdefault(folder + slash, len(folders)))
                yield name + b"\0"

        packed = PackedBytes.of(names())
        start = os.fsencode(below)
        return cls(
            PackedBytes.of(os.path.join(start, folder) for folder in folders),
            tensor_of(folder_of, np.int32),
            packed,
        )

    @classmethod
    def of_records(cls, records: Iterable[dict]) -> ImageFiles:
        """The files of any records."""
        if isinstance(records, ImageFiles):
            return records
        return cls.of(os.fsencode(record["file_name"]) for record in records)

    @classmethod
    def joined(cls, parts: Sequence[ImageFiles]) -> ImageFiles:
        """The images of one or more, in their order."""
        parts = [part for part in parts if len(part)] or parts[:1]
        if len(parts) == 1:
            return parts[0]
        starts = accumulate((len(part._folders) for part in parts), initial=0)
        folder_of = [part._folder_of + start for part, start in zip(parts, starts, strict=False)]
        return cls(
            PackedBytes.joined([part._folders for part in parts]),
            torch.cat(folder_of),
            PackedBytes.joined([part._names for part in parts]),
        )

    @property
    def folders(self) -> list[str]:
        """Those that images lie in."""
        return [os.fsdecode(folder) for folder in self._folders]

    @property
    def base_names(self) -> memoryview:
        """The names of all files without their folders, as bytes, with a zero byte between them."""
        return self._names.block.numpy()[:-1].data

    def in_folders(self, chosen: Sequence[bool]) -> list[int]:
        """The images that lie in folders that are chosen, of which there is one word for each."""
        is_chosen = torch.tensor(chosen, dtype=torch.bool)[self._folder_of]
        return is_chosen.nonzero().flatten().tolist()

    def without(self, images: Sequence[int]) -> ImageFiles:
        """The others, in their order."""
        kept = torch.ones(len(self), dtype=torch.bool)
        kept[torch.tensor(images, dtype=torch.int64)] = False
        return ImageFiles(self._folders, self._folder_of[kept], self._names.only(kept))

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[dict]:
        folders = self.folders
        for i, (folder, name) in enumerate(zip(self._folder_of.numpy(), self._names, strict=True)):
            yield {"file_name": folders[folder] + os.fsdecode(name[:-1]), "image_id": i}

    def _record(self, index: int) -> dict:
        path = self._folders[int(self._folder_of[index])] + self._names[index][:-1]
        return {"file_name": os.fsdecode(path), "image_id": index}
