#!/usr/bin/env python
"""Export a trained detector to TorchScript, ONNX, plain Detectron2 or, its backbone, timm.

    python tools/export.py --weights output/mine/model_best.pth --images data/val \\
        --torchscript mine.pt --onnx mine.onnx --detectron2 mine

The TorchScript and ONNX graphs take an image and return boxes, scores, classes, localization
quality and log-variances; locreweight/export/graph.py documents them. A json beside each has the
class names, the score threshold with the best F1 on the test set, and the size that images must be
resized to. Both are compared with the model on the given images. ``--detectron2`` writes weights
and a config that Detectron2 reads without this package. ``--timm`` writes the backbone, if it is
from timm, as weights in timm's names.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode
from torch import Tensor

from locreweight.checkpoint.timm_weights import write_timm_weights
from locreweight.command_line import (
    HelpFormatter,
    add_weights_arguments,
    check_outputs,
    positive,
    reports_errors,
)
from locreweight.data.datasets.image_folders import load_folder
from locreweight.data.image_io import read_rgb
from locreweight.engine.predictor import Predictor, model_input
from locreweight.errors import UsageError
from locreweight.export.graph import export_graphs, graph_metadata
from locreweight.export.stock import write_stock_detector


def check_onnx_is_installed() -> None:
    """Check the optional dependencies of ``--onnx`` before anything is written."""
    missing = [name for name in ("onnx", "onnxruntime") if not importlib.util.find_spec(name)]
    if missing:
        raise UsageError(f"--onnx needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def load_detector(weights: str, config_file: str, *, last: bool = False) -> Predictor:
    """Load a detector of this project on the CPU."""
    detector = Predictor(weights, config_file, device="cpu", last=last)
    if detector.is_plain_detector:
        raise UsageError(
            f"{weights} is a plain Detectron2 detector: export it with Detectron2's own tools"
        )
    return detector


def load_images(cfg: CfgNode, files: Sequence[str]) -> list[Tensor]:
    """Load images as inputs of a graph: ``(3, H, W)`` float32, resized."""
    return [model_input(cfg, read_rgb(file))["image"].float() for file in files]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    add_weights_arguments(parser)
    parser.add_argument(
        "--config-file", default="", help="config, for checkpoints that do not contain it"
    )
    parser.add_argument("--images", default="", help="folder of images to compare on, with objects")
    parser.add_argument("--count", type=positive, default=8, help="number of images to compare on")
    parser.add_argument("--torchscript", type=Path, help="TorchScript file to write")
    parser.add_argument("--onnx", type=Path, help="ONNX file to write")
    parser.add_argument(
        "--detectron2", type=Path, help="files for plain Detectron2 to write, without suffix"
    )
    parser.add_argument(
        "--timm", type=Path, help="safetensors file to write: the backbone in timm's names"
    )
    parser.add_argument(
        "--first-order",
        action="store_true",
        help="with --detectron2: convert corners to Detectron2's box coding, so that a yaml config "
        "is enough; changes boxes slightly",
    )
    args = parser.parse_args()
    graphs = args.torchscript or args.onnx
    if not (graphs or args.detectron2 or args.timm):
        parser.error("nothing to write: use --torchscript, --onnx, --detectron2 or --timm")
    if graphs and not args.images:
        parser.error("--torchscript and --onnx need --images to trace and to compare with")
    if args.torchscript and args.torchscript == args.onnx:
        parser.error("--torchscript and --onnx name the same file")
    return args


@reports_errors
def main() -> None:
    args = parse_arguments()
    if args.onnx:
        check_onnx_is_installed()
    check_outputs(args.torchscript, args.onnx, args.timm)
    detector = load_detector(args.weights, args.config_file, last=args.last)
    if args.torchscript or args.onnx:
        files = [record["file_name"] for record in load_folder(args.images)][: args.count]
        lines = export_graphs(
            detector.model,
            load_images(detector.cfg, files),
            graph_metadata(detector.cfg, detector.class_names, detector.score_threshold),
            torchscript=args.torchscript,
            onnx=args.onnx,
        )
        print("\n".join(lines))
    if args.detectron2:
        written = write_stock_detector(
            args.detectron2,
            detector.cfg,
            detector.model.state_dict(),
            first_order=args.first_order,
        )
        print(f"for Detectron2: {' '.join(map(str, written))}")
        if detector.cfg.MODEL.ROI_BOX_HEAD.VOTING_SIGMA > 0:
            print(
                "warning: boxes will differ, because Detectron2 has no voting "
                "(MODEL.ROI_BOX_HEAD.VOTING_SIGMA)"
            )
    if args.timm:
        write_timm_weights(args.timm, detector.cfg, detector.model)
        print(f"for timm: {args.timm} ({detector.cfg.MODEL.TIMM.NAME})")


if __name__ == "__main__":
    main()
