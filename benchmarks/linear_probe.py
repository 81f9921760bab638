#!/usr/bin/env python
"""Whether the features of a pretrained backbone separate classes better than random ones.

    python -m benchmarks.linear_probe --config-file configs/detectors/cpu-mobilenetv2.yaml \\
        MODEL.TIMM.PRETRAINED mobilenet_v2.pth DATASETS.TRAIN "('voc:datasets/bccd:train',)" \\
        DATASETS.TEST "('voc:datasets/bccd:test',)" DATASETS.CLASS_NAMES "('RBC','WBC','Platelets')"

A linear classifier (ridge regression to one-hot labels) is fitted to the frozen features of crops
of the annotated objects in DATASETS.TRAIN, and tested on those in DATASETS.TEST: once with the
weights that the config starts from, once with random weights. The features are the means of all
feature maps. Weights that were converted wrongly are no better than random ones.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from torch import Tensor

from benchmarks.timing import print_table
from locreweight.checkpoint.checkpointer import TeacherCheckpointer
from locreweight.checkpoint.timm_weights import load_pretrained
from locreweight.command_line import ConfigArgumentParser
from locreweight.config import load_config
from locreweight.data.image_io import read_rgb
from locreweight.data.training_sets import register_datasets
from locreweight.modeling import SemiSupervisedRCNN, build_detector

SIDE = 96  # of the crops after resizing, in pixels
SMALLEST = 8  # shorter side of the boxes that are used, in pixels


def read_crops(names: list[str], per_class: int, seed: int = 0) -> tuple[np.ndarray, Tensor]:
    """Read crops of annotated objects, at most a number of each class.

    Returns:
        ``(N, SIDE, SIDE, 3)`` uint8 RGB, and their classes ``(N,)``.
    """
    boxes: dict[int, list[tuple[str, list[int]]]] = defaultdict(list)
    for record in (record for name in names for record in DatasetCatalog.get(name)):
        for entry in record["annotations"]:
            box = BoxMode.convert(entry["bbox"], entry["bbox_mode"], BoxMode.XYXY_ABS)
            x1, y1, x2, y2 = (round(value) for value in box)
            if min(x2 - x1, y2 - y1) >= SMALLEST:
                boxes[entry["category_id"]].append((record["file_name"], [x1, y1, x2, y2]))
    crops, classes = [], []
    for label in sorted(boxes):
        found = boxes[label]
        for file, (x1, y1, x2, y2) in random.Random(seed).sample(found, min(per_class, len(found))):
            crop = read_rgb(file)[max(y1, 0) : y2, max(x1, 0) : x2]
            crops.append(cv2.resize(crop, (SIDE, SIDE), interpolation=cv2.INTER_AREA))
            classes.append(label)
    return np.stack(crops), torch.tensor(classes)


@torch.no_grad()
def features_of(model: SemiSupervisedRCNN, crops: np.ndarray) -> Tensor:
    """Means of all feature maps of the backbone below its pyramid, ``(N, channels)``."""
    bottom_up = getattr(model.backbone, "bottom_up", None) or model.backbone.net
    pixels = torch.from_numpy(crops.transpose(0, 3, 1, 2).copy())
    if model.input_format == "BGR":
        pixels = pixels.flip(1)
    batches = []
    for batch in pixels.split(64):
        images = model.preprocess_image([{"image": image} for image in batch])
        maps = bottom_up(images.tensor).values()
        batches.append(torch.cat([feature.mean((2, 3)) for feature in maps], dim=1))
    return torch.cat(batches)


def probe_accuracy(
    train: Tensor, train_classes: Tensor, test: Tensor, test_classes: Tensor, ridge: float = 1.0
) -> float:
    """Accuracy of a ridge classifier, as the mean over the classes, in percent."""
    mean, std = train.mean(0), train.std(0).clamp_min(1e-6)
    x, y = ((features - mean) / std for features in (train, test))
    count = int(train_classes.max()) + 1
    targets = torch.nn.functional.one_hot(train_classes, count).to(x) - 1 / count
    # With the kernel, because there are more features than crops in small sets.
    weights = x.T @ torch.linalg.solve(x @ x.T + ridge * len(x) * torch.eye(len(x)), targets)
    correct = (y @ weights).argmax(1) == test_classes
    per_class = [correct[test_classes == label].float().mean() for label in test_classes.unique()]
    return 100 * float(torch.stack(per_class).mean())


def compare(cfg: CfgNode, per_class: int) -> list[list]:
    """Accuracy with the config's start weights and with random weights, as rows of a table."""
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = "cpu"
    register_datasets(cfg)
    train, test = (read_crops(list(cfg.DATASETS[key]), per_class) for key in ("TRAIN", "TEST"))
    rows = []
    for name in ("pretrained", "random"):
        torch.manual_seed(0)
        model = build_detector(cfg).eval()
        if name == "pretrained" and cfg.MODEL.WEIGHTS:
            TeacherCheckpointer(model, save_to_disk=False).load(cfg.MODEL.WEIGHTS)
        elif name == "pretrained":
            load_pretrained(cfg, model)
        accuracy = probe_accuracy(
            features_of(model, train[0]), train[1], features_of(model, test[0]), test[1]
        )
        rows.append([name, len(train[1]), len(test[1]), f"{accuracy:.1f}"])
    return rows


def parse_arguments() -> argparse.Namespace:
    parser = ConfigArgumentParser(description=__doc__)
    parser.add_argument("--config-file", required=True, help="config of detector and data")
    parser.add_argument("--per-class", type=int, default=200, help="crops of each class")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    cfg = load_config(args.config_file, args.opts)
    rows = compare(cfg, args.per_class)
    classes = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).thing_classes
    headers = ["weights", "crops to fit", "crops to test", "accuracy, mean over classes, %"]
    print_table(f"linear probe on {', '.join(classes)}", headers, rows)


if __name__ == "__main__":
    main()
