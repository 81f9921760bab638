"""The files of images without annotations, millions of them."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

import numpy as np
import torch

from .packed import Packed, PackedBytes, tensor_of


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
