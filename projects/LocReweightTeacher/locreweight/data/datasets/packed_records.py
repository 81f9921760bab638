"""Records in a few blocks of memory, whatever their number, which loader workers share.

Of a list of dictionaries every forked worker ends up with a copy: Python counts references inside
of the objects, so that looking at one writes to its page of memory. These blocks hold no objects.
Workers that are spawned get them from torch through shared memory.
"""

from __future__ import annotations

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
    """Byte strings, one behind the other in one block.

    Attributes:
        block: uint8, all of them.
        ends: ``(N,)`` int64, where in it each ends.
    """

    # Tensors, which torch moves to shared memory when a worker is spawned: arrays made of them are
    # not to be kept.
    block: torch.Tensor
    ends: torch.Tensor

    @classmethod
    def of(cls, strings: Iterable[bytes]) -> PackedBytes:
        """Pack them; no two need to be in memory at once."""
        block, ends = bytearray(), array("q")
        for string in strings:
            block += string
            ends.append(len(block))
        return cls(tensor_of(block, np.uint8), tensor_of(ends, np.int64))

    @classmethod
    def joined(cls, parts: Sequence[PackedBytes]) -> PackedBytes:
        """One behind the other."""
        starts = accumulate((len(part.block) for part in parts), initial=0)
        ends = [part.ends + start for part, start in zip(parts, starts, strict=False)]
        return cls(torch.cat([part.block for part in parts]), torch.cat(ends))

    def only(self, chosen: torch.Tensor) -> PackedBytes:
        """Those where ``chosen``, ``(N,)`` bool, is true."""
        lengths = self.ends.diff(prepend=self.ends.new_zeros(1))
        return PackedBytes(
            self.block[chosen.repeat_interleave(lengths)], lengths[chosen].cumsum(dim=0)
        )

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


def tensor_of(numbers: bytearray | array, kind: type[np.generic]) -> torch.Tensor:
    """Numbers that are in memory already, as a tensor."""
    return torch.from_numpy(np.frombuffer(numbers, kind))


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
