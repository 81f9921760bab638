#!/usr/bin/env python
"""Detect objects in images and videos with a checkpoint and draw them.

    python tools/predict.py --weights output/mine/model_best.pth \\
        --input photos --output detections --json detections.json

Checkpoints of train_net.py contain their config and class names. The pictures show class, score and
localization quality of each box. --json writes a list in COCO's result format: ``image_id`` counts
the images from 1, ``category_id`` the classes from 1, ``bbox`` is (x, y, width, height) in pixels
of the image. Additional fields are ``file_name``, ``category_name``, ``localization_quality`` (null
for a plain Detectron2 detector) and, for videos, ``frame`` (from 0). Unreadable files are skipped
and listed at the end; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from locreweight.command_line import ConfigArgumentParser, add_checkpoint_arguments
from locreweight.engine.inference import (
    INPUT_HELP,
    add_drawing_arguments,
    drawing_style,
    exit_if_unreadable,
    find_inputs,
)
from locreweight.engine.prediction import predict_files
from locreweight.engine.predictor import load_predictor
from locreweight.errors import UsageError


def main() -> None:
    parser = ConfigArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_checkpoint_arguments(parser)
    parser.add_argument("--input", nargs="+", required=True, help=f"{INPUT_HELP}; videos too")
    parser.add_argument("--output", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--json", type=Path, help="write all detections to this file")
    parser.add_argument("--threshold", type=float, default=0.5, help="minimum score. Default: 0.5")
    parser.add_argument("--count", type=int, help="maximum number of files")
    add_drawing_arguments(parser)
    args = parser.parse_args()
    try:
        files = find_inputs(args.input, args.output)[: args.count]
        detector = load_predictor(args.weights, args.config_file, args.opts, args.device)
        batch = args.batch or detector.default_batch_size
        results, unreadable = predict_files(
            detector, files, args.output, args.threshold, batch, drawing_style(args)
        )
    except UsageError as error:
        sys.exit(f"error: {error}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results.entries))
    print(f"{len(results.entries)} detections in {results.num_images} images: {args.output}")
    exit_if_unreadable(unreadable, len(files))


if __name__ == "__main__":
    main()
