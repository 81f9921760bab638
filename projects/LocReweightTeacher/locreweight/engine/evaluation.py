"""Average precision of a model on the test sets of a config."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import OrderedDict
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import Metadata, MetadataCatalog, build_detection_test_loader
from detectron2.data.datasets.coco import convert_to_coco_json
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    PascalVOCDetectionEvaluator,
    inference_on_dataset,
    print_csv_format,
)
from detectron2.evaluation.pascal_voc_evaluation import parse_rec
from detectron2.utils import comm
from torch import nn

from ..data.checks import check_classes
from ..errors import UsageError

logger = logging.getLogger(__name__)


def evaluate(cfg: CfgNode, model: nn.Module) -> dict:
    """Evaluate on all ``DATASETS.TEST``; to be called on all processes.

    Returns:
        On the main process ``{"bbox": {"AP": ..., "AP50": ..., ...}}`` in percent, for Pascal VOC
        ``"voc_11_point"`` beside it; with several test sets one such dictionary for each name.
        Elsewhere the same without content.

    Raises:
        UsageError: if a data set has no annotations or its classes are not the model's.
    """
    results = OrderedDict()
    for name in cfg.DATASETS.TEST:
        loader = build_detection_test_loader(cfg, name)
        classes = list(MetadataCatalog.get(name).get("thing_classes", []))
        if not classes:
            raise UsageError(f"{name} of DATASETS.TEST has no annotations to evaluate with")
        check_classes({name: classes}, cfg.MODEL.ROI_HEADS.NUM_CLASSES)
        results[name] = inference_on_dataset(model, loader, _build_evaluator(cfg, name)) or {}
        if comm.is_main_process():
            print_csv_format(results[name])
    return next(iter(results.values())) if len(results) == 1 else dict(results)


def main_metric(cfg: CfgNode) -> str:
    """Under which name the AP of the first test set is logged; it decides which teacher is best."""
    return "bbox/AP" if len(cfg.DATASETS.TEST) == 1 else f"{cfg.DATASETS.TEST[0]}/bbox/AP"


class ElevenPointEvaluator(PascalVOCDetectionEvaluator):
    """VOC's own AP of 2007, under a name that leaves COCO's beside it."""

    def evaluate(self) -> dict | None:
        results = super().evaluate()
        return results and {"voc_11_point": results["bbox"]}


def _build_evaluator(cfg: CfgNode, name: str) -> DatasetEvaluator:
    metadata = MetadataCatalog.get(name)
    folder = os.path.join(cfg.OUTPUT_DIR, "inference")
    if not hasattr(metadata, "json_file"):
        # The ground truth as it was read, with areas where the annotations lack them. Written anew
        # in each run: a cached conversion outlives the annotations that it was made of.
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        json_file = os.path.join(folder, f"ground_truth_{digest}.json")
        if comm.get_local_rank() == 0:  # machines may not share a disk
            convert_to_coco_json(name, json_file, allow_cached=False)
        comm.synchronize()
        metadata.json_file = json_file
    coco = COCOEvaluator(name, tasks=("bbox",), output_dir=folder)
    if metadata.get("evaluator_type") != "pascal_voc" or not _devkit_reads(metadata):
        return coco
    return DatasetEvaluators([coco, ElevenPointEvaluator(name)])


def _devkit_reads(metadata: Metadata) -> bool:
    """Whether the annotations have all that Detectron2's Pascal VOC evaluator asks for."""
    folder = Path(metadata.dirname)
    ids = (folder / "ImageSets" / "Main" / f"{metadata.split}.txt").read_text().split()
    try:
        for image_id in ids:
            parse_rec(str(folder / "Annotations" / f"{image_id}.xml"))
    except (AttributeError, OSError, ValueError) as error:
        logger.warning("no 11-point AP for %s: %s", metadata.name, error)
        return False
    return True


def evaluate_both(cfg: CfgNode, teacher: nn.Module, student: nn.Module, *, alike: bool) -> dict:
    """The teacher's results, and the student's under ``"student"``.

    Args:
        cfg: names the test sets.
        teacher, student: models; each is put back into the mode that it was in.
        alike: the two have the same weights (in burn-in): evaluate once.
    """
    results = evaluate(cfg, teacher)
    return {**results, "student": results if alike else evaluate(cfg, student)}
