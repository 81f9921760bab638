#!/usr/bin/env python
"""Draw the detections of several checkpoints beside the ground truth: the paper's Fig. 5.

    python tools/compare_detections.py --weights output/supervised output/mine \\
        --output comparison.jpg

Each row is an image of an annotated dataset. The first column is the ground truth, each further
column a checkpoint. The color of a box is its class.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tqdm import tqdm

from locreweight.command_line import (
    HelpFormatter,
    add_device_argument,
    add_weights_arguments,
    check_outputs,
    count_of,
    positive,
    reports_errors,
    score,
)
from locreweight.engine.inference import INPUT_HELP, picture_file
from locreweight.engine.localization_analysis import annotated_records
from locreweight.engine.predictor import Predictor
from locreweight.engine.run_folder import unique_names
from locreweight.errors import UsageError
from locreweight.visualization.detections import draw_comparison, select_annotated
from locreweight.visualization.drawing import explained, save_picture

SIDE = 360  # longer side of each image, in pixels


@reports_errors
def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    add_weights_arguments(parser, nargs="+", help="checkpoints or OUTPUT_DIRs")
    parser.add_argument("--names", nargs="+", help="captions of the columns. Default: their paths")
    parser.add_argument(
        "--config-file", default="", help="for checkpoints that do not contain their config"
    )
    add_device_argument(parser)
    parser.add_argument(
        "--dataset", default="", help="annotated dataset. Default: the first of DATASETS.TEST"
    )
    parser.add_argument(
        "--input",
        nargs="+",
        default=[],
        help=f"{INPUT_HELP}, of that dataset. Default: its first images",
    )
    parser.add_argument(
        "--output", type=picture_file, required=True, help="the picture, .jpg or .png"
    )
    parser.add_argument("--count", type=positive, default=6, help="maximum number of images")
    parser.add_argument("--threshold", type=score, default=0.5, help="minimum score")
    args = parser.parse_args()
    check_outputs(args.output)
    names = args.names or unique_names([Path(weights) for weights in args.weights])
    if not len(names) == len(set(names)) == len(args.weights):
        raise UsageError(
            f"{len(args.weights)} checkpoints need {len(args.weights)} different --names"
        )
    detectors = {
        name: Predictor(weights, args.config_file, device=args.device, last=args.last)
        for name, weights in zip(names, args.weights, strict=True)
    }
    for name, detector in detectors.items():
        if detector.class_names != detectors[names[0]].class_names:
            raise UsageError(f"{names[0]} and {name} have different classes")
    records = annotated_records(detectors[names[0]], args.dataset)
    selected = select_annotated(records, args.input, args.count)
    bar = tqdm(selected, desc="images", disable=None)
    picture = draw_comparison(detectors, bar, args.threshold, SIDE)
    if any(detector.has_localization_quality for detector in detectors.values()):
        picture = explained(picture, "At each box: class, score and localization quality q.")
    save_picture(picture, args.output)
    print(f"{count_of(len(selected), 'image')}: {args.output}")


if __name__ == "__main__":
    main()
