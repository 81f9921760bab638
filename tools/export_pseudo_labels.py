#!/usr/bin/env python
"""Write the pseudo-labels of a checkpoint as COCO json, to look at them in a labeling tool.

    python tools/export_pseudo_labels.py --weights output/mine --json pseudo_labels.json

May be called while the training goes on: of an OUTPUT_DIR the last checkpoint is taken. The images
are the unlabeled ones of its config, or those of --input; the teacher sees them as it sees images
to test on, without a flip and in one size. ``file_name`` is relative to the folder that is printed;
each annotation also has its ``score`` and ``localization_quality``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from locreweight.data.training_sets import load_training_sets, register_datasets
from locreweight.engine.inference import (
    INPUT_HELP,
    ImageDetections,
    InputFile,
    detect_in_files,
    exit_if_unreadable,
    find_inputs,
)
from locreweight.engine.predictor import Predictor, load_predictor
from locreweight.errors import UsageError
from predict import add_checkpoint_arguments


def unlabeled_files(detector: Predictor) -> list[InputFile]:
    """The unlabeled images of a checkpoint's config.

    Raises:
        UsageError: if its data sets are not at hand, or it was trained without unlabeled images.
    """
    register_datasets(detector.cfg)
    records = load_training_sets(detector.cfg).unlabeled
    if not records:
        raise UsageError("the config of the checkpoint names no unlabeled images: give --input")
    return [InputFile(Path(r["file_name"]), Path(r["file_name"])) for r in records]


def as_coco(
    seen: Iterable[ImageDetections],
    class_names: list[str],
    threshold: float,
    root: Path,
    *,
    has_localization_quality: bool,
) -> dict:
    """The content of a COCO annotation file; boxes xywh in absolute pixels of each image.

    Args:
        seen: images with detections.
        class_names: in the order of the detections' classes.
        threshold: a detection above this score is a pseudo-label.
        root: ``file_name`` is relative to it.
        measures_quality: as of the detector; without it ``localization_quality`` is null.
    """
    images: list[dict] = []
    annotations: list[dict] = []
    for one in seen:
        height, width = one.image.shape[:2]
        name = os.path.relpath(one.file.path, root)
        image = {"id": len(images) + 1, "file_name": name, "width": width, "height": height}
        images.append(image)
        chosen = one.detections[one.detections.scores > threshold]
        for (x1, y1, x2, y2), label, score, quality in zip(
            chosen.pred_boxes.tensor.tolist(),
            chosen.pred_classes.tolist(),
            chosen.scores.tolist(),
            chosen.localization_quality.tolist(),
            strict=True,
        ):
            box = [round(v, 2) for v in (x1, y1, x2 - x1, y2 - y1)]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": label + 1,
                    "bbox": box,
                    "area": round(box[2] * box[3], 2),
                    "iscrowd": 0,
                    "score": round(score, 5),
                    "localization_quality": round(quality, 5) if has_localization_quality else None,
                }
            )
    categories = [{"id": i, "name": name} for i, name in enumerate(class_names, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def common_folder(files: Iterable[InputFile]) -> Path:
    """The deepest folder that all files lie in."""
    return Path(os.path.commonpath([file.path.absolute().parent for file in files]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_checkpoint_arguments(parser)
    parser.add_argument("--input", nargs="+", default=[], help=f"{INPUT_HELP}; else the unlabeled")
    parser.add_argument("--json", type=Path, required=True, help="the COCO file to write")
    parser.add_argument("--threshold", type=float, help="else SEMI.PSEUDO_LABEL_THRESHOLD")
    parser.add_argument("--count", type=int, help="look at so many images at most")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs of the config")
    args = parser.parse_args()
    unreadable: list[str] = []
    try:
        detector = load_predictor(args.weights, args.config_file, args.opts, args.device)
        files = find_inputs(args.input) if args.input else unlabeled_files(detector)
        files = [file for file in files if not file.is_video][: args.count]
        if not files:
            raise UsageError(f"there is no image in {' '.join(args.input)}")
        seen = detect_in_files(
            detector, files, args.batch or detector.default_batch_size, unreadable
        )
        threshold = args.threshold
        if threshold is None:
            threshold = detector.cfg.SEMI.PSEUDO_LABEL_THRESHOLD
        root = common_folder(files)
        content = as_coco(
            seen,
            detector.class_names,
            threshold,
            root,
            has_localization_quality=detector.has_localization_quality,
        )
    except UsageError as error:
        sys.exit(f"error: {error}")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(content))
    boxes, images = len(content["annotations"]), len(content["images"])
    print(f"{boxes} pseudo-labels of {images} images, as a data set: coco:{args.json}:{root}")
    exit_if_unreadable(unreadable, len(files))


if __name__ == "__main__":
    main()
