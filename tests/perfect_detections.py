"""Detections that are equal to the annotations: any AP but 100 is a fault of reader or metric."""

from __future__ import annotations

from pathlib import Path

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from torch import nn

from locreweight.data.checks import countable_boxes
from locreweight.data.training_sets import register_datasets
from locreweight.engine.evaluation import evaluate
from tests.modeling.tiny_model import tiny_config
from tests.tiny_data import CLASSES


class PerfectDetector(nn.Module):
    """Returns the annotated boxes of an image with score 1, in the order of the annotations."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._records = {record["image_id"]: record for record in DatasetCatalog.get(name)}

    def forward(self, inputs: list[dict]) -> list[dict]:
        return [{"instances": self._detections(entry["image_id"])} for entry in inputs]

    def _detections(self, image_id: int | str) -> Instances:
        record = self._records[image_id]
        found = list(countable_boxes(record))
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in found]
        return Instances(
            (record["height"], record["width"]),
            pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
            pred_classes=torch.tensor([a["category_id"] for a in found], dtype=torch.int64),
            scores=torch.ones(len(found)),
        )


def evaluate_perfect(
    name: str, output: Path, settings: dict | None = None, classes: tuple[str, ...] = CLASSES
) -> dict:
    """The results of perfect detections on a test set, as ``evaluate`` returns them."""
    cfg = tiny_config(
        {
            "DATASETS.TEST": [name],
            "DATASETS.CLASS_NAMES": list(classes),
            "MODEL.ROI_HEADS.NUM_CLASSES": len(classes),
            "OUTPUT_DIR": str(output),
        }
        | (settings or {})
    )
    register_datasets(cfg, training=False)
    return evaluate(cfg, PerfectDetector(name))


def countable_by_class(name: str) -> dict[str, int]:
    """Number of boxes that count in evaluation, by class name."""
    classes = MetadataCatalog.get(name).thing_classes
    counts = dict.fromkeys(classes, 0)
    for record in DatasetCatalog.get(name):
        for annotation in countable_boxes(record):
            counts[classes[annotation["category_id"]]] += 1
    return counts
