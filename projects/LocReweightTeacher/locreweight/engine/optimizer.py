"""Optimizer that skips steps with non-finite gradients, without synchronizing with the GPU.

PyTorch's fused optimizers read the gradient scaler's flag on the device. A check on the CPU would
have to wait for the backward pass.
"""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.solver import build_optimizer, get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..errors import UsageError
from ..modeling.committee import members_of

SGDOrAdamW = torch.optim.SGD | torch.optim.AdamW

_FUSED = {"foreach": False, "fused": True}
# Names of the backbone's weights without its pyramid: below FPN, and below the simple pyramid.
_PRETRAINED_PARTS = ("backbone.bottom_up.", "backbone.net.")


def amp_dtype(cfg: CfgNode) -> torch.dtype:
    """The data type that ``SOLVER.AMP.DTYPE`` names.

    Raises:
        UsageError: for an unknown name.
    """
    dtypes = {"float16": torch.float16, "bfloat16": torch.bfloat16}
    if cfg.SOLVER.AMP.DTYPE not in dtypes:
        raise UsageError(
            f"SOLVER.AMP.DTYPE is {cfg.SOLVER.AMP.DTYPE!r}; it must be one of {list(dtypes)}"
        )
    return dtypes[cfg.SOLVER.AMP.DTYPE]


class SkipNonFiniteOptimizer:
    """SGD or AdamW with fused kernels, which skips steps with non-finite gradients.

    Attributes:
        torch_optimizer: built from the config's ``SOLVER`` keys.
        grad_scaler: scales losses for float16. Otherwise its scale is 1, and it only checks whether
            gradients are finite.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module, dtype: torch.dtype) -> None:
        """
        Args:
            cfg: the effective config.
            model: the student, or a :class:`.committee.Committee` of several.
            dtype: of the forward pass.
        """
        optimizer = _build_optimizer(cfg, model)
        _scale_backbone_rates(cfg, model, optimizer)
        self.torch_optimizer = _with_fused_kernels(optimizer)
        self._device = device = next(model.parameters()).device
        # bfloat16 has the range of float32; only float16 needs scaled gradients.
        self._scales = cfg.SOLVER.AMP.ENABLED and dtype is torch.float16
        self.grad_scaler = torch.amp.GradScaler(device.type)
        if not self._scales:
            self.grad_scaler = torch.amp.GradScaler(device.type, init_scale=1.0)
        self._model = model

    def step(self, loss: Tensor) -> dict[str, Tensor]:
        """Compute gradients and update the parameters, unless a gradient is not finite.

        Args:
            loss: scalar. The update is also skipped if it is not finite.

        Returns:
            parameter -> largest absolute value in its gradient.
        """
        # The factor is exactly 1 or NaN: a loss may be infinite with finite gradients.
        one_or_nan = 1 + 0 * loss.detach()
        self.grad_scaler.scale(loss * one_or_nan).backward()
        self.grad_scaler.unscale_(self.torch_optimizer)
        largest = largest_in_gradients(self._model)
        self.grad_scaler.step(self.torch_optimizer)
        self.grad_scaler.update(None if self._scales else 1.0)
        # Now, so that the next forward pass has their memory.
        self.torch_optimizer.zero_grad()
        return largest

    @property
    def loss_scale(self) -> dict[str, Tensor]:
        """``{"loss_scale": scalar}`` on the device if losses are scaled, else empty."""
        if not self._scales:
            return {}
        return {"loss_scale": self.grad_scaler.scale(torch.ones((), device=self._device))}

    def state_dict(self) -> dict:
        scaler = self.grad_scaler.state_dict() if self._scales else {}
        return {"optimizer": self.torch_optimizer.state_dict(), "grad_scaler": scaler}

    def load_state_dict(self, state: dict) -> None:
        saved = state["optimizer"]
        # PyTorch would load the state of another optimizer and fail in the first step.
        if ("betas" in saved["param_groups"][0]) != ("betas" in self.torch_optimizer.defaults):
            raise ValueError("it was trained with another SOLVER.OPTIMIZER")
        # The groups of older checkpoints name other kernels.
        groups = [group | _FUSED for group in saved["param_groups"]]
        self.torch_optimizer.load_state_dict(saved | {"param_groups": groups})
        _fill_missing_momentum(self.torch_optimizer)
        if self._scales and state["grad_scaler"]:
            self.grad_scaler.load_state_dict(state["grad_scaler"])


def largest_in_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Parameter -> scalar: the largest absolute value in its gradient, NaN if one is NaN."""
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    # Not the L2 norm, which overflows long before a gradient does, and not the maximum norm, which
    # PyTorch computes without vectorization on a CPU.
    least, greatest = zip(*(gradient.aminmax() for gradient in named.values()), strict=True)
    largest = torch.maximum(torch.stack(greatest), -torch.stack(least))
    return dict(zip(named, largest.unbind(), strict=True))


def _build_optimizer(cfg: CfgNode, model: nn.Module) -> SGDOrAdamW:
    """Build Detectron2's SGD, or AdamW with the same ``SOLVER`` keys."""
    solver = cfg.SOLVER
    if solver.OPTIMIZER == "SGD":
        return build_optimizer(cfg, model)
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    adam = torch.optim.AdamW(groups, lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY)
    return maybe_add_gradient_clipping(cfg, adam)


def _scale_backbone_rates(cfg: CfgNode, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Multiply learning rates in the backbone by ``SOLVER.BACKBONE_LR_FACTOR`` and ``..._DECAY``.

    Raises:
        UsageError: if a factor is negative, or the decay is set for a backbone without blocks.
    """
    solver = cfg.SOLVER
    if solver.BACKBONE_LR_FACTOR == 1.0 and solver.BACKBONE_LR_DECAY == 1.0:
        return
    for key in ("BACKBONE_LR_FACTOR", "BACKBONE_LR_DECAY"):
        if solver[key] < 0:
            raise UsageError(f"SOLVER.{key} is {solver[key]:g}; it must not be negative")
    names = {p: name for member in members_of(model) for name, p in member.named_parameters()}
    blocks = {name.split(".blocks.")[1].split(".")[0] for name in names.values() if _is_block(name)}
    if solver.BACKBONE_LR_DECAY != 1.0 and not blocks:
        raise UsageError(
            f"SOLVER.BACKBONE_LR_DECAY {solver.BACKBONE_LR_DECAY:g} is for plain vision "
            "transformers (MODEL.BACKBONE.NAME build_timm_simple_pyramid_backbone); set 1.0"
        )

    def factor(parameter: nn.Parameter) -> float:
        name = names[parameter]
        if not name.startswith(_PRETRAINED_PARTS):
            return 1.0
        decay = get_vit_lr_decay_rate(name, solver.BACKBONE_LR_DECAY, len(blocks))
        return solver.BACKBONE_LR_FACTOR * decay

    groups = []
    for group in optimizer.param_groups:
        by_factor: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_factor.setdefault(factor(parameter), []).append(parameter)
        groups += [
            group | {"params": parameters, "lr": group["lr"] * rate}
            for rate, parameters in by_factor.items()
        ]
    optimizer.param_groups[:] = groups


def _is_block(name: str) -> bool:
    return name.startswith("backbone.net.") and ".blocks." in name


def _with_fused_kernels(optimizer: SGDOrAdamW) -> SGDOrAdamW:
    """The same optimizer with PyTorch's fused kernels."""
    groups = [group | _FUSED for group in optimizer.param_groups]
    fused = type(optimizer)(groups, fused=True)
    _fill_missing_momentum(fused)
    return fused


def _fill_missing_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Create missing momentum buffers of SGD as zeros.

    PyTorch creates them as uninitialized memory in the first step. If that step is skipped they
    would stay uninitialized.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("momentum") else ():
            state = optimizer.state[parameter]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)


class RunningStatistics:
    """Running statistics of a model's batch norm, which a skipped step must not change.

    The forward pass updates them, not the optimizer. There are none with frozen batch norm.
    """

    def __init__(self, model: nn.Module) -> None:
        self._statistics = [
            statistics
            for module in model.modules()
            if isinstance(module, _NormBase) and module.track_running_stats
            for statistics in module.buffers(recurse=False)
        ]
        self._backup = [statistics.clone() for statistics in self._statistics]

    def backup(self) -> None:
        """Keep a copy of the current values."""
        self._copy(self._backup, self._statistics)

    def restore(self, unless: torch.Tensor | None = None) -> None:
        """Restore the values of the last :meth:`backup`.

        Args:
            unless: bool scalar on the model's device; if it is true, nothing is restored.
        """
        if unless is None:
            self._copy(self._statistics, self._backup)
            return
        for statistics, backup in zip(self._statistics, self._backup, strict=True):
            statistics.copy_(torch.where(unless, statistics, backup))

    def broadcast(self) -> None:
        """Copy the values of the first process to all processes, whose teachers would differ."""
        if comm.get_world_size() > 1:
            # A dict keeps the order, which has to be the same in all processes; a set does not.
            for dtype in dict.fromkeys(statistics.dtype for statistics in self._statistics):
                group = [s for s in self._statistics if s.dtype == dtype]
                # One message instead of many, because each waits for the slowest process.
                message = torch.cat([s.flatten() for s in group])
                torch.distributed.broadcast(message, src=0)
                parts = message.split([s.numel() for s in group])
                self._copy(group, [p.view_as(s) for p, s in zip(parts, group, strict=True)])

    @staticmethod
    def _copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        if targets:
            torch._foreach_copy_(targets, sources)
