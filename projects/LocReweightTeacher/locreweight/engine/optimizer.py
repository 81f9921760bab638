"""The optimizer's step, which leaves itself out where a gradient is not finite.

The device decides so, by PyTorch's own means: a fused optimizer asks the gradient scaler's flag in
its kernel. The host would have to wait for the backward pass in order to know.
"""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_optimizer
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

_KERNELS = {"foreach": False, "fused": True}


class SkipNonFiniteOptimizer:
    """Detectron2's optimizer, fused, and the scaler that says when it has to stand still.

    Attributes:
        optimizer: by the config's ``SOLVER`` keys.
        grad_scaler: scales losses for float16; otherwise its scale is 1, and it only looks.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module, dtype: torch.dtype) -> None:
        """
        Args:
            cfg: the effective config.
            model: whose parameters are trained.
            dtype: what the forward pass computes in.
        """
        self.optimizer = _fused(build_optimizer(cfg, model))
        self._device = device = next(model.parameters()).device
        # bfloat16 has the range of float32; only float16 needs its gradients scaled.
        self._scales = cfg.SOLVER.AMP.ENABLED and dtype is torch.float16
        self.grad_scaler = torch.amp.GradScaler(device.type)
        if not self._scales:
            self.grad_scaler = torch.amp.GradScaler(device.type, init_scale=1.0)
        self._model = model

    def step(self, loss: Tensor) -> dict[str, Tensor]:
        """Backward pass, and an update unless a gradient is not finite.

        Args:
            loss: scalar; if it is not finite no gradient is.

        Returns:
            parameter -> the largest absolute number in its gradient.
        """
        self.optimizer.zero_grad()
        # Exactly 1, or NaN: an infinite loss can have a finite gradient.
        counts = 1 + 0 * loss.detach()
        self.grad_scaler.scale(loss * counts).backward()
        self.grad_scaler.unscale_(self.optimizer)
        largest = largest_in_gradients(self._model)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update(None if self._scales else 1.0)
        return largest

    @property
    def loss_scale(self) -> dict[str, Tensor]:
        """``loss_scale``, to be logged, where losses are scaled; left on the device."""
        if not self._scales:
            return {}
        return {"loss_scale": self.grad_scaler.scale(torch.ones((), device=self._device))}

    def state_dict(self) -> dict:
        scaler = self.grad_scaler.state_dict() if self._scales else {}
        return {"optimizer": self.optimizer.state_dict(), "grad_scaler": scaler}

    def load_state_dict(self, state: dict) -> None:
        saved = state["optimizer"]
        # Groups come with all their settings; those of older checkpoints ask for other kernels.
        groups = [group | _KERNELS for group in saved["param_groups"]]
        self.optimizer.load_state_dict(saved | {"param_groups": groups})
        _begin_momentum(self.optimizer)
        if self._scales and state["grad_scaler"]:
            self.grad_scaler.load_state_dict(state["grad_scaler"])


def largest_in_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Parameter -> scalar: the largest absolute number in its gradient, NaN if one is NaN."""
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    # Not Euclidean lengths, which overflow long before a gradient does; and not maximum norms,
    # which PyTorch computes one number at a time on a CPU.
    least, greatest = zip(*(gradient.aminmax() for gradient in named.values()), strict=True)
    largest = torch.maximum(torch.stack(greatest), -torch.stack(least))
    return dict(zip(named, largest.unbind(), strict=True))


def _fused(optimizer: torch.optim.SGD) -> torch.optim.SGD:
    """The same optimizer with PyTorch's fused kernels, which update all parameters in one."""
    groups = [group | _KERNELS for group in optimizer.param_groups]
    fused = type(optimizer)(groups, fused=True)
    _begin_momentum(fused)
    return fused


def _begin_momentum(optimizer: torch.optim.SGD) -> None:
    """Zeros where there is none yet.

    PyTorch would make empty memory of it in the first step, and leave it so if that is left out;
    with what happened to lie there the second one would go anywhere.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            state = optimizer.state[parameter]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)


# --------------------------------------------------------------------------------------------------
# Running statistics of batch norm, which the forward pass changes and no optimizer knows of.


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
