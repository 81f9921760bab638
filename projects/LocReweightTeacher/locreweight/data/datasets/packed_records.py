"""Records in a few memory blocks that loader workers share.

Every forked worker ends up with its own copy of a list of dictionaries, because Python's reference
counts are inside the objects. The blocks here contain no Python objects. Workers that are spawned
get them from torch through shared memory.
"""

from __future__ import annotations

import os
import pickle
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import overload

import numpy as np
import torch


@dataclass(frozen=True)
class PackedBytes:
    """Sequence of byte strings in one memory block.

    Attributes:
        block: uint8, the strings one after another.
        ends: ``(N,)`` int64, end of each string in the block.
    """

    # Tensors, because torch moves them to shared memory when a worker is spawned. Numpy views of
    # them must not be kept, since they would be copied.
    block: torch.Tensor
    ends: torch.Tensor

    @classmethod
    def of(cls, strings: Iterable[bytes]) -> PackedBytes:
        """Pack strings; only one of them needs to be in memory at a time."""
        block, ends = bytearray(), array("q")
        for string in strings:
            block += string
            ends.append(len(block))
        return cls(_as_tensor(block, np.uint8), _as_tensor(ends, np.int64))

    @classmethod
    def concatenate(cls, parts: Sequence[PackedBytes]) -> PackedBytes:
        """Concatenate sequences."""
        starts = accumulate((len(part.block) for part in parts), initial=0)
        ends = [part.ends + start for part, start in zip(parts, starts, strict=False)]
        return cls(torch.cat([part.block for part in parts]), torch.cat(ends))

    def select(self, mask: torch.Tensor) -> PackedBytes:
        """The strings where ``mask``, ``(N,)`` bool, is true."""
        lengths = self.ends.diff(prepend=self.ends.new_zeros(1))
        return PackedBytes(self.block[mask.repeat_interleave(lengths)], lengths[mask].cumsum(dim=0))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        ends = self.ends.numpy()
        return self.block.numpy()[ends[index - 1] if index else 0 : ends[index]].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        block, start = self.block.numpy(), 0
        for end in self.ends.numpy():
            yield block[start:end].tobytes()
            start = end


class Packed(Sequence[dict]):
    """Read-only sequence of records; each access creates a new dictionary."""

    def _record(self, index: int) -> dict:
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> dict: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict]: ...
    def __getitem__(self, index: int | slice) -> dict | list[dict]:
        if isinstance(index, slice):
            return [self._record(i) for i in range(len(self))[index]]
        return self._record(range(len(self))[index])


class PackedRecords(Packed):
    """Records in Detectron2's standard format, with any content."""

    def __init__(self, records: Iterable[dict]) -> None:
        self._pickled = PackedBytes.of(pickle.dumps(record, protocol=-1) for record in records)

    def __len__(self) -> int:
        return len(self._pickled)

    def _record(self, index: int) -> dict:
        return pickle.loads(self._pickled[index])


class ImageFiles(Packed):
    """Records of images without annotations: ``file_name`` and ``image_id``, the index.

    Each folder name is stored once; an image takes 13 bytes and its name.
    """

    def __init__(self, folders: PackedBytes, folder_of: torch.Tensor, names: PackedBytes) -> None:
        """
        Args:
            folders: names of folders that end with ``/``, or are empty.
            folder_of: ``(N,)`` int32, index of each image's folder.
            names: N file names without folders, each followed by a zero byte.
        """
        self._folders = folders
        self._folder_of = folder_of
        self._names = names

    @classmethod
    def of(cls, paths: Iterable[bytes], below: str = "") -> ImageFiles:
        """Pack paths.

        Args:
            paths: as returned by :func:`os.fsencode`; only one needs to be in memory at a time.
            below: folder that relative paths are relative to.
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
            _as_tensor(folder_of, np.int32),
            packed,
        )

    @classmethod
    def of_records(cls, records: Iterable[dict]) -> ImageFiles:
        """Pack the file names of records."""
        if isinstance(records, ImageFiles):
            return records
        return cls.of(os.fsencode(record["file_name"]) for record in records)

    @classmethod
    def concatenate(cls, parts: Sequence[ImageFiles]) -> ImageFiles:
        """Concatenate one or more sequences of images."""
        parts = [part for part in parts if len(part)] or parts[:1]
        if len(parts) == 1:
            return parts[0]
        starts = accumulate((len(part._folders) for part in parts), initial=0)
        folder_of = [part._folder_of + start for part, start in zip(parts, starts, strict=False)]
        return cls(
            PackedBytes.concatenate([part._folders for part in parts]),
            torch.cat(folder_of),
            PackedBytes.concatenate([part._names for part in parts]),
        )

    @property
    def folders(self) -> list[str]:
        """All folders that contain images."""
        return [os.fsdecode(folder) for folder in self._folders]

    @property
    def base_names(self) -> memoryview:
        """File names without folders, as bytes, separated by zero bytes."""
        return self._names.block.numpy()[:-1].data

    def entries(self) -> Iterator[tuple[int, bytes]]:
        """Yield the index of each image's folder and its file name without the folder."""
        names = (name[:-1] for name in self._names)
        return zip(self._folder_of.numpy(), names, strict=True)

    def in_folders(self, mask: Sequence[bool]) -> list[int]:
        """Indices of the images in the folders where ``mask``, one value per folder, is true."""
        is_selected = torch.tensor(mask, dtype=torch.bool)[self._folder_of]
        return is_selected.nonzero().flatten().tolist()

    def without(self, indices: Sequence[int]) -> ImageFiles:
        """All images but those with the given indices."""
        kept = torch.ones(len(self), dtype=torch.bool)
        kept[torch.tensor(indices, dtype=torch.int64)] = False
        return ImageFiles(self._folders, self._folder_of[kept], self._names.select(kept))

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[dict]:
        folders = self.folders
        for i, (folder, name) in enumerate(self.entries()):
            yield {"file_name": folders[folder] + os.fsdecode(name), "image_id": i}

    def _record(self, index: int) -> dict:
        path = self._folders[int(self._folder_of[index])] + self._names[index][:-1]
        return {"file_name": os.fsdecode(path), "image_id": index}


def _as_tensor(values: bytearray | array, dtype: type[np.generic]) -> torch.Tensor:
    """View a buffer as a tensor."""
    return torch.from_numpy(np.frombuffer(values, dtype))
