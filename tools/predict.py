#!/usr/bin/env python
"""Detect objects in images, videos and streams with a checkpoint.

    python tools/predict.py --weights output/mine --input photos --output pictures
    python tools/predict.py --weights output/mine --input photos --save-json found.json
    python tools/predict.py --weights output/mine --input 0 --frames 500 --output recorded

At least one kind of output is required; several can be combined:

--output      images and videos with class, score and localization quality of each box
--save-json   a list in COCO's result format: ``image_id`` counts the images from 1, ``category_id``
              the classes from 1, ``bbox`` is (x, y, width, height) in pixels of the image.
              Additional fields are ``file_name``, ``category_name``, ``localization_quality`` (null
              if the model was not trained to predict it) and, for videos, ``frame`` (from 0)
--save-coco   a COCO annotation file, which is a data set: coco:<file>:<folder of the images>
--save-yolo   YOLO label files and classes.txt: yolo:<folder of the images>:<folder>
--save-crops  the part of the image inside each box, in a folder for each class

Checkpoints of train_net.py contain their config and class names. Unreadable inputs are skipped and
listed at the end; the exit code is then 1. Ctrl-C ends a stream; everything up to there is written.
"""

from __future__ import annotations

import argparse
import sys
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
from locreweight.engine.detection_files import (
    CocoDataset,
    CocoResults,
    CropWriter,
    DetectionWriter,
    PictureWriter,
    YoloLabels,
    common_folder,
)
from locreweight.engine.inference import (
    INPUT_HELP,
    STREAM_HELP,
    add_drawing_arguments,
    drawing_style,
    exit_if_unreadable,
    find_inputs,
)
from locreweight.engine.prediction import predict_files
from locreweight.engine.predictor import Predictor
from locreweight.errors import UsageError

OUTPUTS = ("output", "save_json", "save_coco", "save_yolo", "save_crops")


def parse_arguments() -> argparse.Namespace:
    parser = ConfigArgumentParser(description=__doc__)
    add_checkpoint_arguments(parser)
    parser.add_argument("--input", nargs="+", required=True, help=f"{INPUT_HELP}; {STREAM_HELP}")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="folder for pictures")
    parser.add_argument("--save-json", "--json", type=Path, metavar="FILE", help="COCO results")
    parser.add_argument("--save-coco", type=Path, metavar="FILE", help="COCO annotations")
    parser.add_argument("--save-yolo", type=Path, metavar="FOLDER", help="YOLO labels")
    parser.add_argument("--save-crops", type=Path, metavar="FOLDER", help="objects, cut out")
    parser.add_argument("--threshold", type=score, help=THRESHOLD_HELP)
    parser.add_argument(
        "--classes", nargs="+", default=[], metavar="NAME", help="classes to keep. Default: all"
    )
    parser.add_argument("--count", type=positive, help="maximum number of inputs. Default: all")
    parser.add_argument(
        "--frames", type=positive, help="maximum number of frames of each video. Default: all"
    )
    add_drawing_arguments(parser)
    args = parser.parse_args()
    if not any(getattr(args, name) for name in OUTPUTS):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in OUTPUTS)
        parser.error(f"nothing to write: use at least one of {flags}")
    if args.save_json and args.save_json == args.save_coco:
        parser.error("--save-json and --save-coco name the same file")
    return args


def describe_threshold(detector: Predictor, given: float | None) -> str:
    """What is kept, and why."""
    reason = ""
    if given is None:
        known = detector.score_threshold is not None
        reason = ", the best F1 on the test set" if known else "; its best threshold is not known"
    return f"objects with a score above {detector.threshold:.2g}{reason}"


def is_inside(folder: Path, inputs: list[str]) -> bool:
    """Whether a folder is inside one of the inputs, and not the input itself."""
    return any(Path(item).resolve() in folder.resolve().parents for item in inputs)


@reports_errors
def main() -> None:
    args = parse_arguments()
    check_outputs(args.save_json, args.save_coco)
    check_outputs(args.output, args.save_yolo, args.save_crops, are_folders=True)
    # Results of earlier calls are not inputs. Crops can be in or above an input folder.
    pictures = [args.output] if args.output else []
    if args.save_crops and is_inside(args.save_crops, args.input):
        pictures.append(args.save_crops)
    files = find_inputs(args.input, pictures)[: args.count]
    is_stream = any(file.stream for file in files)
    if (args.save_coco or args.save_yolo) and any(file.is_video for file in files):
        raise UsageError("--save-coco and --save-yolo are for images: use --save-json for videos")
    detector = Predictor(
        args.weights,
        args.config_file,
        args.opts,
        args.device,
        last=args.last,
        threshold=args.threshold,
    )
    print(f"{detector.cfg.MODEL.WEIGHTS}: {describe_threshold(detector, args.threshold)}")
    if note := detector.threshold_note:
        print(f"note: {note}")
    writers: list[DetectionWriter] = []
    if args.output:
        writers.append(PictureWriter(args.output, drawing_style(args)))
    if args.save_json:
        writers.append(CocoResults(args.save_json))
    if args.save_coco:
        root = common_folder(file.path for file in files)
        writers.append(CocoDataset(args.save_coco, detector.class_names, root))
    if args.save_yolo:
        writers.append(YoloLabels(args.save_yolo, detector.class_names, files))
    if args.save_crops:
        writers.append(CropWriter(args.save_crops))
    summary = predict_files(
        detector,
        files,
        writers,
        classes=args.classes,
        batch=args.batch,
        max_frames=args.frames,
    )
    written = " ".join(str(getattr(args, name)) for name in OUTPUTS if getattr(args, name))
    kind = "frame" if all(file.is_video for file in files) else "image"
    found = f"{count_of(summary.objects, 'detection')} in {count_of(summary.images, kind)}"
    print(f"{found}: {written}")
    if args.save_coco:
        print(f"as a data set: coco:{args.save_coco}:{root}")
    if summary.interrupted:
        print("stopped by Ctrl-C")
        if not is_stream:
            sys.exit(130)
    exit_if_unreadable(summary.unreadable, len(files))


if __name__ == "__main__":
    main()
