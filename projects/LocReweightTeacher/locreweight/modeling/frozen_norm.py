"""Frozen batch norm as a part of the convolution before it, where it costs nothing."""

from __future__ import annotations

from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn


class ConvWithFrozenNorm(Conv2d):
    """Detectron2's convolution with frozen batch norm, as one operation on the image.

    Frozen batch norm multiplies each channel by a constant and adds another. Instead of every pixel
    the weights are multiplied, which takes gradients through to them. Names and values of all
    parameters and buffers stay, so that checkpoints do.
    """

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = norm.bias - norm.running_mean * scale
        x = self._conv_forward(x, self.weight * scale[:, None, None, None], shift)
        return x if self.activation is None else self.activation(x)


def fold_frozen_norms(model: nn.Module) -> None:
    """Let all convolutions that are followed by frozen batch norm do both at once, in place."""
    for module in model.modules():
        # Of subclasses it is not known what they do between the two.
        has_norm = type(module) is Conv2d and isinstance(module.norm, FrozenBatchNorm2d)
        if has_norm and module.bias is None:
            module.__class__ = ConvWithFrozenNorm
