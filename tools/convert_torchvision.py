#!/usr/bin/env python
"""Convert the weights of a torchvision ResNet, so that training can start from them.

    python tools/convert_torchvision.py resnet50-11ad3fa6.pth R-50-torchvision.pkl

Works for torchvision.models.resnet*, resnext* and wide_resnet*. Unlike Detectron2's own ResNets,
they expect RGB images divided by the standard deviation, and have the stride in the 3x3
convolution: the script prints the config keys to set.
"""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path

from torch import Tensor

from locreweight.checkpoint.conversion import resnet_from_torchvision, torchvision_resnet_settings
from locreweight.checkpoint.safe_loading import read_weights
from locreweight.command_line import HelpFormatter, reports_errors
from locreweight.errors import UsageError


@reports_errors
def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("weights", type=Path, help="weight file of torchvision")
    parser.add_argument("output", type=Path, help="file to write; its name must end with .pkl")
    args = parser.parse_args()
    if args.output.suffix != ".pkl":
        raise UsageError(f"the name of {args.output} must end with .pkl, for Detectron2")
    weights = read_weights(str(args.weights))
    settings = torchvision_resnet_settings(weights)
    if not all(isinstance(value, Tensor) for value in weights.values()):
        raise UsageError(f"{args.weights} does not only hold tensors: use torchvision's file")
    arrays = {name: value.numpy() for name, value in resnet_from_torchvision(weights).items()}
    content = {"model": arrays, "__author__": "torchvision", "matching_heuristics": True}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_bytes(pickle.dumps(content))
    print(f"to train from {args.output}, set")
    print(" ".join(f"{key} '{value}'" for key, value in settings.items()))
    print(f"MODEL.WEIGHTS {args.output}")


if __name__ == "__main__":
    main()
