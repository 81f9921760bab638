#!/usr/bin/env python
"""Make torchvision's ResNet weights a start of training.

    python tools/convert_torchvision.py resnet50-11ad3fa6.pth R-50-torchvision.pkl

The files are those of torchvision.models.resnet*, resnext* and wide_resnet*. Unlike the weights
that Detectron2 starts from, they want RGB images divided by their standard deviation, and the
stride in the 3x3 convolution: the command prints the config keys to say so.
"""

from __future__ import annotations

import argparse
import pickle
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from locreweight.checkpoint.safe_loading import read_weights
from locreweight.errors import UsageError

# Number of blocks in the four stages, and whether they are bottlenecks -> depth.
_DEPTHS: dict[tuple[tuple[int, ...], bool], int] = {
    ((2, 2, 2, 2), False): 18,
    ((3, 4, 6, 3), False): 34,
    ((3, 4, 6, 3), True): 50,
    ((3, 4, 23, 3), True): 101,
    ((3, 8, 36, 3), True): 152,
}
_RENAMED = (
    (r"^(conv1|bn1)\.", r"stem.\1."),
    (r"^layer(\d)\.", lambda match: f"res{int(match[1]) + 1}."),
    (r"\bbn(\d)\.", r"conv\1.norm."),
    (r"\bdownsample\.0\.", "shortcut."),
    (r"\bdownsample\.1\.", "shortcut.norm."),
)


def to_detectron2(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ResNet of torchvision under Detectron2's names, without its classifier."""
    converted = {}
    for name, value in weights.items():
        if name.startswith("fc."):
            continue
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        converted[name] = value
    return converted


def settings_for(weights: Mapping[str, Tensor]) -> dict[str, object]:
    """The config keys that such a ResNet needs; images are described as torchvision trains them.

    Raises:
        UsageError: if these are not the weights of a ResNet that both libraries have.
    """
    if not (isinstance(weights, Mapping) and "conv1.weight" in weights):
        raise UsageError("these are not the weights of a ResNet of torchvision")
    blocks = tuple(
        len({name.split(".")[1] for name in weights if name.startswith(f"layer{stage}.")})
        for stage in (1, 2, 3, 4)
    )
    bottlenecks = "layer1.0.conv3.weight" in weights
    depth = _DEPTHS.get((blocks, bottlenecks))
    if depth is None:
        raise UsageError(f"there is no ResNet with {blocks} blocks in both libraries")
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("weights", type=Path, help="a file of torchvision's")
    parser.add_argument("output", type=Path, help="file to write; its name ends with .pkl")
    args = parser.parse_args()
    try:
        if args.output.suffix != ".pkl":
            raise UsageError(f"the name of {args.output} has to end with .pkl, for Detectron2")
        weights = read_weights(str(args.weights))
        settings = settings_for(weights)
        if not all(isinstance(value, Tensor) for value in weights.values()):
            raise UsageError(f"{args.weights} holds more than tensors: give torchvision's own file")
    except UsageError as error:
        sys.exit(f"error: {error}")
    arrays = {name: value.numpy() for name, value in to_detectron2(weights).items()}
    content = {"model": arrays, "__author__": "torchvision", "matching_heuristics": True}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_bytes(pickle.dumps(content))
    print(f"{args.output} is for training with:")
    print(" ".join(f"{key} '{value}'" for key, value in settings.items()))
    print(f"MODEL.WEIGHTS {args.output}")


if __name__ == "__main__":
    main()
