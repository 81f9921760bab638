#!/usr/bin/env python
"""Write the pseudo-labels of a checkpoint as COCO json, for example to check them in a label tool.

    python tools/export_pseudo_labels.py --weights output/mine --json pseudo_labels.json

Can be used during training: the last checkpoint of an OUTPUT_DIR is loaded. Images are the
unlabeled images of the checkpoint's config or those of --input. They are preprocessed as test
images, without flips and in one size. ``file_name`` is relative to the folder that is printed. Each
annotation also has its ``score`` and ``localization_quality``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from locreweight.command_line import ConfigArgumentParser, add_checkpoint_arguments
from locreweight.engine.inference import (
    INPUT_HELP,
    detect_in_files,
    exit_if_unreadable,
    find_inputs,
)
from locreweight.engine.prediction import (
    common_folder,
    pseudo_label_dataset,
    unlabeled_files,
)
from locreweight.engine.predictor import load_predictor
from locreweight.errors import UsageError


def main() -> None:
    parser = ConfigArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_checkpoint_arguments(parser)
    parser.add_argument(
        "--input", nargs="+", default=[], help=f"{INPUT_HELP}. Default: the unlabeled images"
    )
    parser.add_argument("--json", type=Path, required=True, help="COCO file to write")
    parser.add_argument(
        "--threshold", type=float, help="minimum score. Default: SEMI.PSEUDO_LABEL_THRESHOLD"
    )
    parser.add_argument("--count", type=int, help="maximum number of images")
    args = parser.parse_args()
    unreadable: list[str] = []
    try:
        detector = load_predictor(args.weights, args.config_file, args.opts, args.device)
        files = find_inputs(args.input) if args.input else unlabeled_files(detector)
        files = [file for file in files if not file.is_video][: args.count]
        if not files:
            raise UsageError(f"there is no image in {' '.join(args.input)}")
        batch = args.batch or detector.default_batch_size
        threshold = args.threshold
        if threshold is None:
            threshold = detector.cfg.SEMI.PSEUDO_LABEL_THRESHOLD
        root = common_folder(files)
        detections = detect_in_files(detector, files, batch, unreadable)
        content = pseudo_label_dataset(detections, detector, threshold, root)
    except UsageError as error:
        sys.exit(f"error: {error}")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(content))
    num_labels, num_images = len(content["annotations"]), len(content["images"])
    print(
        f"{num_labels} pseudo-labels of {num_images} images, as a dataset: coco:{args.json}:{root}"
    )
    exit_if_unreadable(unreadable, len(files))


if __name__ == "__main__":
    main()
