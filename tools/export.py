#!/usr/bin/env python
"""Write a trained detector for other programs; each option names a file to write.

    python tools/export.py --weights output/mine/model_best.pth --images data/val \\
        --torchscript mine.pt --onnx mine.onnx --detectron2 mine

TorchScript and ONNX take an image and give boxes, scores, classes, localization quality and
log-variances; locreweight/export/graph.py says in which form. A json beside each says class names
and how large the model likes its images. Both are compared with the model on the images given.
``--detectron2`` writes weights and a config that Detectron2 reads without this package.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from locreweight.data.datasets.image_folders import load_folder
from locreweight.data.image_io import read_rgb
from locreweight.engine.predictor import Predictor, load_predictor
from locreweight.errors import UsageError
from locreweight.export.graph import (
    INPUT,
    OUTPUTS,
    description,
    detections,
    write_onnx,
    write_torchscript,
)
from locreweight.export.stock import write_stock_detector
from locreweight.modeling.meta_arch import SemiSupervisedRCNN

Graph = Callable[[Tensor], Sequence[Tensor]]

# What a graph may differ by from the model, for the order of float operations: pixels, or this
# share of a larger image's side, and units of scores and log-variances.
BOX_TOLERANCE, BOX_SHARE, VALUE_TOLERANCE = 1e-3, 1e-5, 1e-4


def need_onnx() -> None:
    """Before anything is written.

    Raises:
        UsageError: if the libraries for ONNX are not installed.
    """
    missing = [name for name in ("onnx", "onnxruntime") if not importlib.util.find_spec(name)]
    if missing:
        raise UsageError(f"--onnx needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def open_model(weights: str, config_file: str = "") -> Predictor:
    """A trained detector on the CPU.

    Raises:
        UsageError: if it cannot be had, or is not of this project.
    """
    detector = load_predictor(weights, config_file, device="cpu")
    if not detector.has_localization_quality:
        raise UsageError(f"{weights} is a plain Detectron2 detector: tools of Detectron2 export it")
    return detector


def model_inputs(detector: Predictor, files: Sequence[str]) -> list[Tensor]:
    """Images as a graph takes them: ``(3, H, W)`` float32, resized, in the model's channels."""
    return [detector.model_input(read_rgb(file))["image"].float() for file in files]


def open_torchscript(file: Path) -> Graph:
    return torch.jit.load(str(file))


def open_onnx(file: Path) -> Graph:
    import onnxruntime  # of the extra `export`

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda image: [
        torch.from_numpy(output) for output in session.run(list(OUTPUTS), {INPUT: image.numpy()})
    ]


@torch.no_grad()
def differences(model: SemiSupervisedRCNN, graph: Graph, images: Sequence[Tensor]) -> list[float]:
    """The largest difference of each of ``OUTPUTS``; infinite for another number of detections."""
    largest = [0.0] * len(OUTPUTS)
    for image in images:
        for i, (ours, theirs) in enumerate(
            zip(detections(model, image), graph(image), strict=True)
        ):
            alike = ours.shape == theirs.shape
            gaps = (ours - theirs).abs().float() if alike else torch.tensor([float("inf")])
            largest[i] = max(largest[i], *gaps.flatten().tolist(), 0.0)
    return largest


def check(name: Path, model: SemiSupervisedRCNN, graph: Graph, images: Sequence[Tensor]) -> str:
    """One line on how a graph compares with the model.

    Raises:
        UsageError: if they differ by more than the order of float operations explains.
    """
    largest = differences(model, graph, images)
    sizes = {tuple(image.shape[1:]) for image in images}
    line = ", ".join(f"{name} {gap:.1e}" for name, gap in zip(OUTPUTS, largest, strict=True))
    boxes, *others = largest
    longest = max(max(size) for size in sizes)
    if boxes > max(BOX_TOLERANCE, BOX_SHARE * longest) or max(others) > VALUE_TOLERANCE:
        raise UsageError(f"{name} differs from the model: {line}")
    return f"{name}: largest differences on {len(images)} images of {len(sizes)} sizes: {line}"


def export_graphs(
    detector: Predictor,
    images: Sequence[Tensor],
    torchscript: Path | None,
    onnx: Path | None,
) -> list[str]:
    """Write the graphs that have a file named, each with its json; a line on the check of each."""
    model = detector.model
    with torch.no_grad():
        example = max(images, key=lambda image: len(detections(model, image)[0]))
    described = description(detector.cfg, detector.class_names)
    lines = []
    for file in filter(None, (torchscript, onnx)):
        file.parent.mkdir(parents=True, exist_ok=True)
        if file is torchscript:
            write_torchscript(model, example, file)
        else:
            write_onnx(model, example, file, described)
        file.with_name(file.name + ".json").write_text(json.dumps(described, indent=2) + "\n")
        graph = open_torchscript(file) if file is torchscript else open_onnx(file)
        lines.append(check(file, model, graph, images))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--weights", required=True, help="a checkpoint, an OUTPUT_DIR, or locreweight://<name>"
    )
    parser.add_argument("--config-file", default="", help="for checkpoints that do not say it")
    parser.add_argument("--images", default="", help="folder of images to compare on, with objects")
    parser.add_argument("--count", type=int, default=8, help="compare on so many of them")
    parser.add_argument("--torchscript", type=Path, help="file to write")
    parser.add_argument("--onnx", type=Path, help="file to write")
    parser.add_argument("--detectron2", type=Path, help="files to write, without their endings")
    parser.add_argument(
        "--first-order",
        action="store_true",
        help="with --detectron2: a yaml config for corner boxes, which changes boxes a little",
    )
    args = parser.parse_args()
    graphs = args.torchscript or args.onnx
    if not (graphs or args.detectron2):
        parser.error("nothing to write: give --torchscript, --onnx or --detectron2")
    if graphs and not args.images:
        parser.error("--torchscript and --onnx need --images to trace and to compare with")
    if args.count < 1:
        parser.error("--count has to be at least 1")
    if args.torchscript and args.torchscript == args.onnx:
        parser.error("--torchscript and --onnx name the same file")
    try:
        if args.onnx:
            need_onnx()
        detector = open_model(args.weights, args.config_file)
        if graphs:
            files = [record["file_name"] for record in load_folder(args.images)][: args.count]
            images = model_inputs(detector, files)
            for line in export_graphs(detector, images, args.torchscript, args.onnx):
                print(line)
        if args.detectron2:
            written = write_stock_detector(
                args.detectron2,
                detector.cfg,
                detector.model.state_dict(),
                first_order=args.first_order,
            )
            print(f"for Detectron2: {' '.join(map(str, written))}")
    except UsageError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
