#!/usr/bin/env python
"""Ground truth and the detections of several checkpoints side by side: the paper's Fig. 5.

    python tools/compare_detections.py --weights output/supervised output/mine \\
        --output compared.jpg

Each row is an image of an annotated data set; the first column is the ground truth, each further
one a checkpoint. Boxes have the colors of their classes.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from locreweight.data.image_io import read_rgb
from locreweight.data.monitored import ground_truth_in_view
from locreweight.engine.inference import INPUT_HELP, find_inputs, picture_file
from locreweight.engine.localization_analysis import annotated_records
from locreweight.engine.predictor import Predictor, load_predictor
from locreweight.engine.run_folder import unique_names
from locreweight.errors import UsageError
from locreweight.visualization.drawing import (
    Layer,
    captioned,
    class_colors,
    draw,
    grid,
    save_picture,
)
from predict import draw_detections

SIDE = 360  # pixels of a picture's longer side


def draw_truth(image: np.ndarray, record: dict, class_names: list[str], side: int) -> np.ndarray:
    """An image with its ground truth.

    Args:
        image: ``(H, W, 3)`` uint8 RGB.
        record: its annotations, in pixels of the image.
        class_names: in the order of the annotations' classes.
        side: longer side of the picture.
    """
    truth = ground_truth_in_view(record, torch.eye(3), image.shape[:2])
    names = [class_names[label] for label in truth.gt_classes.tolist()]
    return draw(image, [Layer(truth.gt_boxes.tensor, class_colors(truth.gt_classes), names)], side)


def compare(
    detectors: dict[str, Predictor], records: Sequence[dict], threshold: float
) -> np.ndarray:
    """A row for each image: ground truth, and what each of the named detectors finds; RGB."""
    rows = []
    for record in tqdm(records, desc="images", disable=None):
        image = read_rgb(record["file_name"])
        names = next(iter(detectors.values())).class_names
        cells = [captioned(draw_truth(image, record, names, SIDE), "ground truth")]
        for name, detector in detectors.items():
            (found,) = detector.detect([image])
            picture = draw_detections(image, found[found.scores > threshold], detector, SIDE)
            cells.append(captioned(picture, name))
        rows.append(cells)
    return grid(rows)


def choose(records: list[dict], inputs: Sequence[str], count: int) -> list[dict]:
    """The records of the images that were given, or else the first ones.

    Raises:
        UsageError: for an image that is not of the data set.
    """
    if not inputs:
        return records[:count]
    by_path = {os.path.realpath(record["file_name"]): record for record in records}
    chosen = []
    for file in find_inputs(inputs)[:count]:
        record = by_path.get(os.path.realpath(file.path))
        if record is None:
            raise UsageError(f"{file.path} is not in the data set: name the right --dataset")
        chosen.append(record)
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", nargs="+", required=True, help="checkpoints or OUTPUT_DIRs")
    parser.add_argument("--names", nargs="+", help="of the columns; else their paths")
    parser.add_argument("--config-file", default="", help="for checkpoints that do not say it")
    parser.add_argument("--device", default="", help="cuda or cpu; a GPU is used if there is one")
    parser.add_argument("--dataset", default="", help="annotated; else the first of DATASETS.TEST")
    parser.add_argument("--input", nargs="+", default=[], help=f"{INPUT_HELP}, of that data set")
    parser.add_argument(
        "--output", type=picture_file, required=True, help="the picture, .jpg or .png"
    )
    parser.add_argument("--count", type=int, default=6, help="compare so many images at most")
    parser.add_argument("--threshold", type=float, default=0.5, help="least score")
    args = parser.parse_args()
    names = args.names or unique_names([Path(weights) for weights in args.weights])
    try:
        if len(set(names)) != len(args.weights):
            raise UsageError(f"{len(args.weights)} checkpoints need as many --names, all different")
        detectors = {
            name: load_predictor(weights, args.config_file, device=args.device)
            for name, weights in zip(names, args.weights, strict=True)
        }
        for name, detector in detectors.items():
            if detector.class_names != detectors[names[0]].class_names:
                raise UsageError(f"{names[0]} and {name} have different classes")
        records = annotated_records(detectors[names[0]], args.dataset)
        chosen = choose(records, args.input, args.count)
        picture = compare(detectors, chosen, args.threshold)
    except UsageError as error:
        sys.exit(f"error: {error}")
    save_picture(picture, args.output)
    print(f"{len(chosen)} images: {args.output}")


if __name__ == "__main__":
    main()
