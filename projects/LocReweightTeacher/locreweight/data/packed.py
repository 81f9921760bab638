"""Records in a few blocks of memory, whatever their number, which loader workers share.

Of a list of dictionaries every forked worker ends up with a copy: Python counts references inside
of the objects, so that looking at one writes to its page of memory. These blocks hold no objects.
Workers that are spawned get them from torch through shared memory.
"""

from __future__ import annotations

import pickle
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np
import torch


class PackedBytes:
    """Byte strings, one behind the other in one block."""

    def __init__(self, block: np.ndarray, ends: np.ndarray) -> None:
        """
        Args:
            block: uint8, all of them.
            ends: ``(N,)`` int64, where in it each ends.
        """
        self.block = block
        self._ends = ends

    @classmethod
    def of(cls, strings: Iterable[bytes]) -> PackedBytes:
        """Pack them; no two need to be in memory at once."""
        block, ends = bytearray(), array("q")
        for string in strings:
            block += string
            ends.append(len(block))
        return cls(np.frombuffer(block, np.uint8), np.frombuffer(ends, np.int64))

    @classmethod
    def joined(cls, parts: Sequence[PackedBytes]) -> PackedBytes:
        """One behind the other."""
        starts = np.cumsum([0, *(len(part.block) for part in parts)])
        ends = [part._ends + start for part, start in zip(parts, starts[:-1], strict=True)]
        return cls(np.concatenate([part.block for part in parts]), np.concatenate(ends))

    def only(self, chosen: np.ndarray) -> PackedBytes:
        """Those where ``chosen``, ``(N,)`` bool, is true."""
        lengths = np.diff(self._ends, prepend=0)
        return PackedBytes(self.block[np.repeat(chosen, lengths)], lengths[chosen].cumsum())

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> bytes:
        return self.block[self._ends[index - 1] if index else 0 : self._ends[index]].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        start = 0
        for end in self._ends:
            yield self.block[start:end].tobytes()
            start = end

    def __getstate__(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(self.block), torch.from_numpy(self._ends)

    def __setstate__(self, state: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.block, self._ends = (tensor.numpy() for tensor in state)


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
