#!/usr/bin/env python
"""Suggest which unlabeled images to label next, and write them with their pseudo-labels.

    python tools/suggest_labels.py --weights output/mine --count 50 --output datasets/mine/round1
    python tools/suggest_labels.py --weights output/mine --count 50 --output datasets/mine/round1 \
        --format label-studio

Images are chosen if the model is uncertain about classes or boxes, or finds other objects in the
mirrored image. They also differ from each other and from the labeled images. The folder --output
gets

images/           links to the images
annotations.json  the pseudo-labels to be corrected, with --format coco;
labels/           with --format yolo;
tasks.json        with --format label-studio, and tasks.xml with the labeling interface
suggestions.csv   the images, the most useful one first, with the uncertainties
overview.jpg      the first images, with the pseudo-labels drawn

docs/getting_started.md shows how to correct the labels and train again.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from locreweight.command_line import (
    THRESHOLD_HELP,
    ConfigArgumentParser,
    add_checkpoint_arguments,
    check_outputs,
    count_of,
    positive,
    reports_errors,
    score,
)
from locreweight.engine.inference import INPUT_HELP, exit_if_unreadable, find_inputs
from locreweight.engine.label_suggestion import suggest
from locreweight.engine.labeling_task import TaskFormat, check_new_folder, write_labeling_task
from locreweight.engine.prediction import TrainingFiles, training_files
from locreweight.engine.predictor import Predictor


def parse_arguments() -> argparse.Namespace:
    parser = ConfigArgumentParser(description=__doc__)
    add_checkpoint_arguments(parser)
    parser.add_argument(
        "--input",
        nargs="+",
        default=[],
        help=f"{INPUT_HELP}. Default: the unlabeled images of the training",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="new folder")
    parser.add_argument("--count", type=positive, default=50, help="number of images to suggest")
    parser.add_argument(
        "--format",
        type=TaskFormat,
        choices=list(TaskFormat),
        default=TaskFormat.COCO,
        help="format",
    )
    parser.add_argument("--threshold", type=score, help=f"of the pseudo-labels: {THRESHOLD_HELP}")
    parser.add_argument(
        "--pool", type=positive, help="choose among so many images, drawn at random. Default: all"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of --pool")
    parser.add_argument("--copy", action="store_true", help="copy the images instead of linking")
    return parser.parse_args()


@reports_errors
def main() -> None:
    args = parse_arguments()
    unreadable: list[str] = []
    # Before the images are assessed, which takes long.
    check_outputs(args.output, are_folders=True)
    check_new_folder(args.output)
    detector = Predictor(
        args.weights,
        args.config_file,
        args.opts,
        args.device,
        last=args.last,
        threshold=args.threshold,
    )
    sets = TrainingFiles([], find_inputs(args.input)) if args.input else training_files(detector)
    files = [file for file in sets.unlabeled if not file.is_video]
    if args.pool and args.pool < len(files):
        files = random.Random(args.seed).sample(files, args.pool)
    suggestions = suggest(
        detector, files, sets.labeled, args.count, batch=args.batch, unreadable=unreadable
    )
    dataset = write_labeling_task(args.output, detector, suggestions, args.format, copy=args.copy)
    print(f"{len(suggestions)} of {count_of(len(files), 'image')}: {args.output}")
    print(f"when corrected, add to DATASETS.TRAIN: {dataset}")
    exit_if_unreadable(unreadable, len(files) + len(sets.labeled))


if __name__ == "__main__":
    main()
