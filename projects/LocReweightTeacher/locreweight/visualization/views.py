"""Draw the weak and strong views of images as training will see them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from torch import Tensor
from tqdm import tqdm

from ..data.checks import check_boxes, check_images_decode, check_images_exist
from ..data.datasets.catalog import register
from ..data.image_io import UnreadableImage
from ..data.mapper import ViewMapper
from ..data.monitored import MonitoredImages, ground_truth_in_view, has_annotations
from ..data.transforms.views import UnlabeledSample
from ..engine.inference import find_inputs
from ..errors import UsageError
from ..geometry import between_views, warp_boxes
from ..modeling.meta_arch import SemiSupervisedRCNN
from .drawing import (
    CLASS_COLORS,
    Color,
    Layer,
    captioned,
    draw,
    explained,
    grid,
    rgb_pixels,
)

VIEW_SIDE = 400  # longer side of a drawn view, in pixels
LEGEND = (
    "Dashed: ground truth, with its class. Solid: the student's proposals; a proposal has the same "
    "number and color in both views and must enclose the same part of the image."
)


def select_records(cfg: CfgNode, inputs: Sequence[str], count: int) -> list[dict]:
    """Select the images to draw.

    Args:
        cfg: names the datasets.
        inputs: image files, folders or patterns; if empty, ``DATASETS.TRAIN`` is used.
        count: largest number of images.

    Returns:
        dataset records. An image that is in no annotated dataset has a ``file_name`` only.

    Raises:
        UsageError: if a dataset of ``DATASETS.TRAIN`` or an input does not exist, or the
            annotations of an image cannot be used.
    """
    records = _annotated_records(cfg)
    if not inputs:
        return _checked(cfg, records[:count])
    annotated = {os.path.realpath(record["file_name"]): record for record in records}
    files = [str(file.path) for file in find_inputs(inputs) if not file.is_video][:count]
    records = [annotated.get(os.path.realpath(file), {"file_name": file}) for file in files]
    return _checked(cfg, records)


def draw_view_table(
    cfg: CfgNode, records: list[dict], student: SemiSupervisedRCNN, num_proposals: int, seed: int
) -> np.ndarray:
    """Draw one row per record: its weak and strong view with ground truth and proposals.

    A legend is below.

    Args:
        cfg: defines the augmentations.
        records: as returned by :func:`select_records`.
        student: predicts proposals.
        num_proposals: number of proposals to draw per image.
        seed: seed of the augmentations.

    Returns:
        ``(H, W, 3)`` uint8, RGB.

    Raises:
        UnreadableImage: if an image cannot be read. Training would replace it with another one.
    """
    views = MonitoredImages(records, ViewMapper(cfg), seed)
    samples = {}
    for index in tqdm(range(len(views)), desc="views", disable=None):
        sample = views[index].views
        if sample.read_errors:
            raise UnreadableImage(sample.read_errors[0])
        samples[sample.file_name] = sample
    class_names = _class_names(cfg)
    rows = []
    for record in {record["file_name"]: record for record in records}.values():
        sample = samples[record["file_name"]]
        proposals = _predict_proposals(student, sample, num_proposals)
        pictures = draw_views(sample, record, proposals, class_names, cfg.INPUT.FORMAT)
        titles = (f"weak: {Path(sample.file_name).name}", "strong")
        rows.append([captioned(p, title) for p, title in zip(pictures, titles, strict=True)])
    return explained(grid(rows), LEGEND)


def draw_views(
    sample: UnlabeledSample,
    record: dict,
    proposals: Tensor,
    class_names: Sequence[str],
    image_format: str,
) -> list[np.ndarray]:
    """Draw the weak and the strong view of an image.

    A proposal has the same color and number in both views.

    Args:
        sample: the views.
        record: its ``annotations`` are drawn dashed, if it has any.
        proposals: ``(N, 4)`` xyxy, absolute pixels of the strong view.
        class_names: names of the annotated classes.
        image_format: "RGB" or "BGR", the channel order of the views.

    Returns:
        two pictures, ``(H, W, 3)`` uint8 RGB.
    """
    weak, strong = sample.weak, sample.strong
    strong_to_weak = between_views(strong.matrix, weak.matrix)
    projected = warp_boxes(proposals, strong_to_weak, weak.image_size)
    pictures = []
    for view, boxes in ((weak, projected), (strong, proposals)):
        numbers = [[str(i + 1)] for i in range(len(boxes))]
        layers = [Layer(boxes, proposal_colors(len(boxes)), numbers)]
        if has_annotations(record):
            truth = ground_truth_in_view(record, view.matrix, view.image_size)
            layers.append(Layer.of_ground_truth(truth, class_names))
        pictures.append(draw(rgb_pixels(view.image, image_format), layers, VIEW_SIDE))
    return pictures


def proposal_colors(count: int) -> list[Color]:
    """Return a color for each proposal; the colors repeat."""
    return [CLASS_COLORS[i % len(CLASS_COLORS)] for i in range(count)]


def _class_names(cfg: CfgNode) -> list[str]:
    """Class names of the registered training sets."""
    return next(
        (
            list(names)
            for name in cfg.DATASETS.TRAIN
            if (names := MetadataCatalog.get(name).get("thing_classes"))
        ),
        [f"class {i}" for i in range(cfg.MODEL.ROI_HEADS.NUM_CLASSES)],
    )


@torch.no_grad()
def _predict_proposals(student: SemiSupervisedRCNN, sample: UnlabeledSample, count: int) -> Tensor:
    """Return the RPN's best proposals, ``(N, 4)`` xyxy, absolute pixels of the strong view."""
    images = student.preprocess_image([{"image": sample.strong.image}])
    proposals, _ = student.proposal_generator(images, student.backbone(images.tensor), None)
    return proposals[0].to("cpu").proposal_boxes.tensor[:count]


def _checked(cfg: CfgNode, records: list[dict]) -> list[dict]:
    """Run the checks of labeled images that training runs."""
    annotated = [record for record in records if "annotations" in record]
    checked = check_boxes(annotated, drop_bad=cfg.DATASETS.CHECKS.DROP_BAD_BOXES)
    check_images_exist(checked)
    if cfg.DATASETS.CHECKS.DECODE_IMAGES:
        check_images_decode(checked)
    kept = iter(checked)
    return [next(kept) if "annotations" in record else record for record in records]


def _annotated_records(cfg: CfgNode) -> list[dict]:
    """Load all annotated datasets of a config. Only those of ``DATASETS.TRAIN`` have to exist."""
    outside = cfg.DATASETS.CHECKS.ALLOW_OUTSIDE_PATHS
    register(cfg.DATASETS.TRAIN, cfg.DATASETS.CLASS_NAMES, allow_outside=outside)
    records = [record for name in cfg.DATASETS.TRAIN for record in DatasetCatalog.get(name)]
    for name in (*cfg.DATASETS.UNLABELED_TRUTH, *cfg.DATASETS.TEST):
        try:
            register([name], cfg.DATASETS.CLASS_NAMES, allow_outside=outside)
        except UsageError:
            continue
        records += DatasetCatalog.get(name)
    return records
