"""Conversion of weights between projects: names, box coding, and torchvision's ResNets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError

# Prefix of the teacher in files of Unbiased Teacher and its successors, which hold both models.
_TEACHER_PREFIX = "modelTeacher."

# (blocks in each of the four stages, whether blocks are bottlenecks) -> depth.
_RESNET_DEPTHS: dict[tuple[tuple[int, ...], bool], int] = {
    ((2, 2, 2, 2), False): 18,
    ((3, 4, 6, 3), False): 34,
    ((3, 4, 6, 3), True): 50,
    ((3, 4, 23, 3), True): 101,
    ((3, 8, 36, 3), True): 152,
}
_RESNET_NAMES = (
    (r"^(conv1|bn1)\.", r"stem.\1."),
    (r"^layer(\d)\.", lambda match: f"res{int(match[1]) + 1}."),
    (r"\bbn(\d)\.", r"conv\1.norm."),
    (r"\bdownsample\.0\.", "shortcut."),
    (r"\bdownsample\.1\.", "shortcut.norm."),
)


# -- names of weights ------------------------------------------------------------------------------


def select_teacher(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Return the teacher's weights if a file holds two models, otherwise all weights."""
    teacher = {name: value for name, value in weights.items() if name.startswith(_TEACHER_PREFIX)}
    return {name.removeprefix(_TEACHER_PREFIX): v for name, v in (teacher or weights).items()}


def describe_random_layers(missing: Iterable[str], wrong_shapes: Iterable[str]) -> str:
    """Describe the layers of a model that a weight file does not initialize.

    Args:
        missing: names of weights that are not in the file.
        wrong_shapes: names of weights that have another shape in the file.
    """
    parts = [
        f"{reason} {', '.join(layers)}"
        for reason, layers in (
            ("missing in the file:", _layers(missing)),
            ("of another shape in the file:", _layers(wrong_shapes)),
        )
        if layers
    ]
    return f"layers not found in MODEL.WEIGHTS, initialized randomly; {'; '.join(parts)}"


def _layers(weights: Iterable[str]) -> list[str]:
    """Names of the layers that weights belong to, such as ``a`` for ``a.weight`` and ``a.bias``."""
    return sorted({name.rpartition(".")[0] or name for name in weights})


# -- box coding ------------------------------------------------------------------------------------
#
# Detectron2 predicts (dx, dy, dw, dh): shifts of the center by dx * w / sx and a width of
# w * exp(dw / sw), with factors (sx, sy, sw, sh). Corner coding predicts offsets of the corners,
# divided by the proposal's size and multiplied by (sx, sy). With exp(d) ~ 1 + d, which is exact for
# shifts,
#
#     x1 = dx - dw * sx / (2 sw),    x2 = dx + dw * sx / (2 sw),    and the same for y.


def corners_from_centers(
    weights: Tensor, factors: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)
) -> Tensor:
    """Convert a box branch that predicts (dx, dy, dw, dh) into one that predicts corner offsets.

    The conversion is exact for shifts, and of first order for changes of size.

    Args:
        weights: ``(C*4, ...)`` weight or bias of a linear layer.
        factors: ``MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS`` of the branch.
    """
    shift_x, shift_y, size_x, size_y = factors
    dx, dy, dw, dh = weights.unflatten(0, (-1, 4)).unbind(dim=1)
    half_w, half_h = dw * (shift_x / (2 * size_x)), dh * (shift_y / (2 * size_y))
    return torch.stack([dx - half_w, dy - half_h, dx + half_w, dy + half_h], dim=1).flatten(0, 1)


def centers_from_corners(
    weights: Tensor, factors: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)
) -> Tensor:
    """Convert a box branch that predicts corner offsets into one for (dx, dy, dw, dh).

    The inverse of :func:`corners_from_centers`, with the same arguments.
    """
    shift_x, shift_y, size_x, size_y = factors
    x1, y1, x2, y2 = weights.unflatten(0, (-1, 4)).unbind(dim=1)
    dw, dh = (x2 - x1) * size_x / shift_x, (y2 - y1) * size_y / shift_y
    return torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, dw, dh], dim=1).flatten(0, 1)


# -- torchvision's ResNets -------------------------------------------------------------------------


def resnet_from_torchvision(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of a torchvision ResNet to Detectron2's names, without the classifier."""
    converted = {}
    for name, value in weights.items():
        if name.startswith("fc."):
            continue
        for pattern, replacement in _RESNET_NAMES:
            name = re.sub(pattern, replacement, name)
        converted[name] = value
    return converted


def torchvision_resnet_settings(weights: Mapping[str, Tensor]) -> dict[str, object]:
    """Config keys that a torchvision ResNet needs, including torchvision's image normalization.

    Raises:
        UsageError: if these are not the weights of a ResNet that both libraries have.
    """
    if not (isinstance(weights, Mapping) and "conv1.weight" in weights):
        raise UsageError("these are not the weights of a torchvision ResNet")
    blocks = tuple(
        len({name.split(".")[1] for name in weights if name.startswith(f"layer{stage}.")})
        for stage in (1, 2, 3, 4)
    )
    bottlenecks = "layer1.0.conv3.weight" in weights
    depth = _RESNET_DEPTHS.get((blocks, bottlenecks))
    if depth is None:
        raise UsageError(f"Detectron2 has no ResNet with {blocks} blocks in its stages")
    settings: dict[str, object] = {
        "MODEL.RESNETS.DEPTH": depth,
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
        "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
        "INPUT.FORMAT": "RGB",
    }
    if not bottlenecks:
        return settings | {"MODEL.RESNETS.RES2_OUT_CHANNELS": 64}
    width, inputs = weights["layer1.0.conv2.weight"].shape[:2]
    groups = width // inputs
    return settings | {
        "MODEL.RESNETS.NUM_GROUPS": groups,
        "MODEL.RESNETS.WIDTH_PER_GROUP": width // groups,
    }
