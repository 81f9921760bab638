"""Running statistics of batch norm, which the forward pass changes and no optimizer knows of."""

from __future__ import annotations

import torch
from detectron2.utils import comm
from torch import nn
from torch.nn.modules.batchnorm import _NormBase


class RunningStatistics:
    """Those of a model that learns them; of none with frozen batch norm, at no cost then."""

    def __init__(self, model: nn.Module) -> None:
        self._statistics = [
            statistics
            for module in model.modules()
            if isinstance(module, _NormBase) and module.track_running_stats
            for statistics in module.buffers(recurse=False)
        ]
        self._kept = [statistics.clone() for statistics in self._statistics]

    def keep(self) -> None:
        """Remember them as they are."""
        self._copy(self._kept, self._statistics)

    def restore(self, unless: torch.Tensor | None = None) -> None:
        """Put back what :meth:`keep` remembered.

        Args:
            unless: scalar, bool: where it is true they stay; the host need not know which it is.
        """
        if unless is None:
            self._copy(self._statistics, self._kept)
            return
        for statistics, kept in zip(self._statistics, self._kept, strict=True):
            statistics.copy_(torch.where(unless, statistics, kept))

    def share(self) -> None:
        """Give all processes the first one's; without, their teachers would differ."""
        if comm.get_world_size() > 1:
            # In the same order in all processes, which a set would not keep.
            for dtype in dict.fromkeys(statistics.dtype for statistics in self._statistics):
                alike = [s for s in self._statistics if s.dtype == dtype]
                # One message: each of them waits for the slowest process.
                message = torch.cat([s.flatten() for s in alike])
                torch.distributed.broadcast(message, src=0)
                parts = message.split([s.numel() for s in alike])
                self._copy(alike, [p.view_as(s) for p, s in zip(parts, alike, strict=True)])

    @staticmethod
    def _copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        if targets:
            torch._foreach_copy_(targets, sources)
