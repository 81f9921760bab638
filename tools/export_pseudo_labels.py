#!/usr/bin/env python
"""Write the pseudo-labels of a checkpoint as COCO json, for example to check them in a label tool.

    python tools/export_pseudo_labels.py --weights output/mine --json pseudo_labels.json

Can be used during training. Images are the unlabeled images of the checkpoint's config or those of
--input. They are preprocessed as test images, without flips and in one size. ``file_name`` is
relative to the folder that is printed. Each annotation also has its ``score`` and
``localization_quality``.
"""

from __future__ import annotations

from pathlib import Path

from locreweight.command_line import (
    ConfigArgumentParser,
    add_checkpoint_arguments,
    check_outputs,
    count_of,
    positive,
    reports_errors,
    score,
)
from locreweight.engine.detection_files import CocoDataset, common_folder
from locreweight.engine.inference import INPUT_HELP, exit_if_unreadable, find_inputs
from locreweight.engine.prediction import predict_files, training_files
from locreweight.engine.predictor import Predictor
from locreweight.errors import UsageError


@reports_errors
def main() -> None:
    parser = ConfigArgumentParser(description=__doc__)
    add_checkpoint_arguments(parser)
    parser.add_argument(
        "--input", nargs="+", default=[], help=f"{INPUT_HELP}. Default: the unlabeled images"
    )
    parser.add_argument("--json", type=Path, required=True, help="COCO file to write")
    parser.add_argument(
        "--threshold", type=score, help="minimum score. Default: SEMI.PSEUDO_LABEL_THRESHOLD"
    )
    parser.add_argument("--count", type=positive, help="maximum number of images. Default: all")
    args = parser.parse_args()
    check_outputs(args.json)
    detector = Predictor(args.weights, args.config_file, args.opts, args.device, last=args.last)
    detector.threshold = (
        detector.cfg.SEMI.PSEUDO_LABEL_THRESHOLD if args.threshold is None else args.threshold
    )
    files = find_inputs(args.input) if args.input else training_files(detector).unlabeled
    files = [file for file in files if not file.is_video][: args.count]
    if not files:
        raise UsageError(f"there is no image in {' '.join(args.input)}")
    root = common_folder(file.path for file in files)
    writer = CocoDataset(args.json, detector.class_names, root)
    summary = predict_files(detector, files, [writer], batch=args.batch)
    print(
        f"{count_of(summary.objects, 'pseudo-label')} of {count_of(summary.images, 'image')}, "
        f"as a dataset: coco:{args.json}:{root}"
    )
    exit_if_unreadable(summary.unreadable, len(files))


if __name__ == "__main__":
    main()
