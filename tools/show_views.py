#!/usr/bin/env python
"""Look at what training will see, before it starts: the weak and the strong view of some images.

    python tools/show_views.py --config-file configs/quickstart.yaml --output views.jpg

Each row is an image: its weak view (the teacher's), its strong view (the student's), both with the
ground truth (green), and the student's proposals: found in the strong view, carried into the weak
one, in the same color and under the same number in both. If a box does not enclose the same thing
in both views, an augmentation or its matrix is wrong. Without --weights the student is random: its
proposals lie anywhere, but have to lie at the same place in both views.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes
from matplotlib import colormaps
from tqdm import tqdm

from locreweight.config import load_config
from locreweight.data.datasets.catalog import register
from locreweight.data.image_io import UnreadableImage
from locreweight.data.mapper import ViewMapper
from locreweight.data.monitored import MonitoredImages, ground_truth_in_view, has_annotations
from locreweight.data.transforms.views import UnlabeledSample
from locreweight.engine.inference import INPUT_HELP, find_inputs, picture_file
from locreweight.engine.panels import view_pixels
from locreweight.engine.predictor import load_student
from locreweight.errors import UsageError
from locreweight.geometry import between_views, warp_boxes
from locreweight.modeling.meta_arch import SemiSupervisedRCNN
from locreweight.visualization.drawing import (
    TRUTH,
    Color,
    Layer,
    captioned,
    draw,
    grid,
    save_picture,
)

_PALETTE = [colormaps["tab10"](i) for i in range(10) if i != 2]  # green is the truth's
SIDE = 400  # pixels of a view's longer side


def records_of(cfg: CfgNode) -> list[dict]:
    """The records of all annotated data sets of the config that are at hand.

    Raises:
        UsageError: if one of ``DATASETS.TRAIN`` is not.
    """
    outside = cfg.DATASETS.CHECKS.ALLOW_OUTSIDE_PATHS
    register(cfg.DATASETS.TRAIN, cfg.DATASETS.CLASS_NAMES, allow_outside=outside)
    records = [record for name in cfg.DATASETS.TRAIN for record in DatasetCatalog.get(name)]
    for name in (*cfg.DATASETS.UNLABELED_TRUTH, *cfg.DATASETS.TEST):
        try:
            register([name], cfg.DATASETS.CLASS_NAMES, allow_outside=outside)
        except UsageError:
            continue  # not needed to look at views
        records += DatasetCatalog.get(name)
    return records


def choose_records(cfg: CfgNode, inputs: list[str], count: int) -> list[dict]:
    """Of the images that were given, or else the first ones of ``DATASETS.TRAIN``.

    Returns:
        records; images of no annotated data set have a ``file_name`` only.
    """
    records = records_of(cfg)
    if not inputs:
        return records[:count]
    annotated = {os.path.realpath(r["file_name"]): r for r in records}
    files = [str(file.path) for file in find_inputs(inputs) if not file.is_video][:count]
    return [annotated.get(os.path.realpath(file), {"file_name": file}) for file in files]


@torch.no_grad()
def propose(student: SemiSupervisedRCNN, sample: UnlabeledSample, count: int) -> Boxes:
    """The student's best proposals in the strong view, xyxy in absolute pixels of it."""
    images = student.preprocess_image([{"image": sample.strong.image}])
    proposals, _ = student.proposal_generator(images, student.backbone(images.tensor), None)
    return proposals[0].to("cpu").proposal_boxes[:count]


def draw_views(
    sample: UnlabeledSample, record: dict, proposals: Boxes, image_format: str
) -> list[np.ndarray]:
    """Pictures of the weak and of the strong view.

    Args:
        sample: the views.
        record: ``annotations`` in it are drawn, boxes in pixels of the original image.
        proposals: xyxy, absolute pixels of the strong view.
        image_format: "RGB" or "BGR", the order of the views' channels.
    """
    weak, strong = sample.weak, sample.strong
    to_weak = between_views(strong.matrix, weak.matrix)
    carried = warp_boxes(proposals.tensor, to_weak, weak.image_size)
    pictures = []
    for view, boxes in ((weak, carried), (strong, proposals.tensor)):
        layers = [Layer(boxes, _colors(len(boxes)), [str(i + 1) for i in range(len(boxes))])]
        if has_annotations(record):
            truth = ground_truth_in_view(record, view.matrix, view.image_size).gt_boxes.tensor
            layers.append(Layer(truth, [TRUTH] * len(truth), width=3))
        pictures.append(draw(view_pixels(view, image_format), layers, SIDE))
    return pictures


def show_views(
    cfg: CfgNode, records: list[dict], student: SemiSupervisedRCNN, proposals: int, seed: int
) -> np.ndarray:
    """A row for each record, in their order: weak and strong view, RGB.

    Raises:
        UnreadableImage: training would take another one instead; here, that one was asked for.
    """
    monitored = MonitoredImages(records, ViewMapper(cfg), seed)
    samples = {}
    for index in tqdm(range(len(monitored)), desc="views", disable=None):
        sample = monitored[index].views
        if sample.read_errors:
            raise UnreadableImage(sample.read_errors[0])
        samples[sample.file_name] = sample
    rows = []
    for record in {record["file_name"]: record for record in records}.values():
        sample = samples[record["file_name"]]
        boxes = propose(student, sample, proposals)
        pictures = draw_views(sample, record, boxes, cfg.INPUT.FORMAT)
        titles = (f"weak: {Path(sample.file_name).name}", "strong")
        rows.append([captioned(p, title) for p, title in zip(pictures, titles, strict=True)])
    return grid(rows)


def _colors(count: int) -> list[Color]:
    colors = (_PALETTE[i % len(_PALETTE)] for i in range(count))
    return [(round(255 * r), round(255 * g), round(255 * b)) for r, g, b, _ in colors]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--weights", default="", help="a checkpoint, for its student's proposals")
    parser.add_argument(
        "--input", nargs="+", default=[], help=f"{INPUT_HELP}; else training images"
    )
    parser.add_argument(
        "--output", type=picture_file, required=True, help="the picture, .jpg or .png"
    )
    parser.add_argument("--count", type=int, default=4, help="look at so many images at most")
    parser.add_argument("--proposals", type=int, default=5, help="of each image")
    parser.add_argument("--seed", type=int, default=0, help="of the augmentations")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs of the config")
    args = parser.parse_args()
    try:
        cfg = load_config(args.config_file, args.opts)
        records = choose_records(cfg, args.input, args.count)
        student = load_student(cfg, args.weights)
        picture = show_views(cfg, records, student, args.proposals, args.seed)
    except UsageError as error:
        sys.exit(f"error: {error}")
    save_picture(picture, args.output)
    print(f"{len(records)} images: {args.output}")


if __name__ == "__main__":
    main()
