#!/usr/bin/env python
"""Draw a checkpoint's detections over images: label, score and localization quality of each box.

    python tools/draw_predictions.py --config-file configs/quickstart.yaml \\
        --weights output/quickstart/model_final.pth --input datasets/synthetic/val --output pictures

With ``--threshold`` at SEMI.PSEUDO_LABEL_THRESHOLD and unlabeled images as input, the boxes are the
pseudo-labels that the student learns from.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer
from matplotlib import colormaps
from tqdm import tqdm

import locreweight.modeling  # noqa: F401  (registers the model)
from locreweight.config import load_config
from locreweight.data.datasets import load_folder
from locreweight.data.training_sets import register_datasets
from locreweight.engine import load_for_evaluation
from locreweight.errors import UsageError

SHORTEST_SIDE = 480  # small images are enlarged to this, in pixels, so that labels can be read

COLORS = [colormaps["Set1"](i)[:3] for i in range(9)]  # of the classes, RGB


def draw_folder(cfg: CfgNode, images: list[str], output: Path, threshold: float) -> list[Path]:
    """Draw what the model of a config finds in image files.

    Args:
        cfg: with ``MODEL.WEIGHTS`` and registered data sets.
        images: files.
        output: folder for the pictures, which keep the names of the images.
        threshold: least score of a box that is drawn.

    Returns:
        the pictures.
    """
    classes = _class_names(cfg)
    predictor = DefaultPredictor(_without_weights(cfg))
    load_for_evaluation(cfg, predictor.model)
    output.mkdir(parents=True, exist_ok=True)
    pictures = []
    for file in tqdm(images, desc=output.name, disable=None):
        image = cv2.imread(file)
        if image is None:
            print(f"skipped {file}: not an image that OpenCV can read", file=sys.stderr)
            continue
        found = predictor(image)["instances"].to("cpu")
        picture = output / f"{Path(file).stem}.png"
        cv2.imwrite(str(picture), draw(image, found[found.scores > threshold], classes))
        pictures.append(picture)
    return pictures


def draw(image: np.ndarray, instances: Instances, classes: list[str]) -> np.ndarray:
    """One image with its boxes.

    Args:
        image: ``(H, W, 3)`` BGR.
        instances: with ``pred_boxes`` (xyxy, absolute pixels of the image), ``pred_classes``,
            ``scores`` and ``localization_quality``.
        classes: names.

    Returns:
        the picture, BGR, enlarged if the image is small.
    """
    labels = [
        f"{classes[label]} {score:.0%} q {quality:.2f}"
        for label, score, quality in zip(
            instances.pred_classes.tolist(),
            instances.scores.tolist(),
            instances.localization_quality.tolist(),
            strict=True,
        )
    ]
    scale = max(1.0, SHORTEST_SIDE / min(image.shape[:2]))
    boxes = instances.pred_boxes.clone()
    boxes.scale(scale, scale)
    # Enlarged before it is drawn on: Visualizer chooses the size of letters by that of the image.
    image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    visualizer = Visualizer(image[:, :, ::-1])
    colors = [COLORS[label % len(COLORS)] for label in instances.pred_classes.tolist()]
    drawn = visualizer.overlay_instances(boxes=boxes, labels=labels, assigned_colors=colors)
    return drawn.get_image()[:, :, ::-1]


def montage(pictures: list[Path], columns: int = 4, height: int = 320) -> np.ndarray:
    """Pictures side by side, in rows; BGR."""
    cells = []
    for picture in pictures:
        image = cv2.imread(str(picture))
        assert image is not None, picture
        width = round(image.shape[1] * height / image.shape[0])
        cells.append(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA))
    rows = [cv2.hconcat(cells[i : i + columns]) for i in range(0, len(cells), columns)]
    widest = max(row.shape[1] for row in rows)
    white = (255, 255, 255)
    return cv2.vconcat(
        [
            cv2.copyMakeBorder(
                row, 0, 0, 0, widest - row.shape[1], cv2.BORDER_CONSTANT, value=white
            )
            for row in rows
        ]
    )


def _without_weights(cfg: CfgNode) -> CfgNode:
    cfg = cfg.clone()
    cfg.MODEL.WEIGHTS = ""
    return cfg


def _class_names(cfg: CfgNode) -> list[str]:
    name = (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN)[0]
    if not hasattr(MetadataCatalog.get(name), "thing_classes"):
        DatasetCatalog.get(name)  # a COCO json says its classes when it is read
    return list(MetadataCatalog.get(name).thing_classes)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--input", nargs="+", required=True, help="images, or one folder of them")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--count", type=int, default=20, help="draw so many images at most")
    parser.add_argument("--montage", type=Path, help="write all pictures into this one, too")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs of the config")
    args = parser.parse_args()
    try:
        cfg = load_config(args.config_file, ["MODEL.WEIGHTS", args.weights, *args.opts])
        register_datasets(cfg, training=not cfg.DATASETS.TEST)
        images = args.input
        if len(images) == 1 and Path(images[0]).is_dir():
            images = [record["file_name"] for record in load_folder(images[0])]
        pictures = draw_folder(cfg, images[: args.count], args.output, args.threshold)
    except UsageError as error:
        sys.exit(f"error: {error}")
    if args.montage and pictures:
        cv2.imwrite(str(args.montage), montage(pictures))
    print(f"{len(pictures)} pictures in {args.output}")


if __name__ == "__main__":
    main()
