"""Records in a few blocks of memory, whatever their number, which loader workers share.

Of a list of dictionaries every forked worker ends up with a copy: Python counts references inside
of the objects, so that looking at one writes to its page of memory. These blocks hold no objects.
Workers that are spawned get them from torch through shared memory.
"""

from __future__ import annotations

import pickle
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
import torch


class PackedBytes:
    """Byte strings, one behind the other."""

    def __init__(self, block: np.ndarray, ends: np.ndarray) -> None:
        """
        Args:
            block: uint8, all of them.
            ends: ``(N,)`` int64, where each ends.
        """
        self._block = block
        self._ends = ends
        self._view = block.data

    @classmethod
    def of(cls, strings: Iterable[bytes]) -> PackedBytes:
        """Pack them; no two need to be in memory at once."""
        block, ends = bytearray(), array("q")
        for string in strings:
            block += string
            ends.append(len(block))
        return cls(np.frombuffer(block, np.uint8), np.frombuffer(ends, np.int64))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> memoryview:
        return self._view[self._ends[index - 1] if index else 0 : self._ends[index]]

    def __iter__(self) -> Iterator[memoryview]:
        start = 0
        for end in self._ends:
            yield self._view[start:end]
            start = end

    def __reduce__(self) -> tuple:
        return _from_tensors, (PackedBytes, *map(torch.from_numpy, (self._block, self._ends)))


class Packed(Sequence[dict]):
    """A read-only sequence of records, each made anew when it is asked for."""

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
    """Records in Detectron2's standard format, with whatever they hold."""

    def __init__(self, records: Iterable[dict]) -> None:
        self._pickled = PackedBytes.of(pickle.dumps(record, protocol=-1) for record in records)

    def __len__(self) -> int:
        return len(self._pickled)

    def _record(self, index: int) -> dict:
        return pickle.loads(self._pickled[index])


class ImageFiles(Packed):
    """Records of images without annotations: ``file_name``, and ``image_id``, the place in here.

    A folder that many images lie in is held once. Apart from folders an image takes 12 bytes and
    its name.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        """
        Args:
            paths: of the images, in their order; any text that Python takes as a path.
        """
        folders: dict[bytes, int] = {}
        folder_of = array("i")

        def names() -> Iterator[bytes]:
            for path in paths:
                folder, slash, name = path.encode(*_ANY_TEXT).rpartition(b"/")
                folder_of.append(folders.setdefault(folder + slash, len(folders)))
                yield name

        self._names = PackedBytes.of(names())
        self._folders = PackedBytes.of(folders)
        self._folder_of = np.frombuffer(folder_of, np.int32)

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[dict]:
        folders = [bytes(folder) for folder in self._folders]
        for i, (folder, name) in enumerate(zip(self._folder_of, self._names, strict=True)):
            yield {"file_name": str(folders[folder] + name, *_ANY_TEXT), "image_id": i}

    def _record(self, index: int) -> dict:
        path = bytes(self._folders[self._folder_of[index]]) + self._names[index]
        return {"file_name": str(path, *_ANY_TEXT), "image_id": index}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_folder_of": torch.from_numpy(self._folder_of)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state | {"_folder_of": state["_folder_of"].numpy()}


# Names in annotation files may hold halves of surrogate pairs, and names of files any bytes, which
# Python turns into such halves.
_ANY_TEXT = ("utf-8", "surrogatepass")


def _from_tensors(kind: type, *tensors: torch.Tensor) -> Any:
    return kind(*(tensor.numpy() for tensor in tensors))
