"""Average precision of a model on the test sets of a config."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import OrderedDict
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog, build_detection_test_loader
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
from ..data.datasets.voc import split_file
from ..data.mapper import RecordMapper
from ..errors import UsageError

logger = logging.getLogger(__name__)


def evaluate(cfg: CfgNode, model: nn.Module, *, keep_detections: bool = True) -> dict:
    """Evaluate on all ``DATASETS.TEST``; to be called on all processes.

    Args:
        cfg: names the test sets.
        model: is put back into the mode that it was in.
        keep_detections: write them to ``OUTPUT_DIR/inference``.

    Returns:
        On the main process ``{"bbox": {"AP": ..., "AP50": ..., ...}}`` in percent, for Pascal VOC
        ``"voc_11_point"`` beside it; with several test sets one such dictionary for each name.
        Elsewhere the same without content.

    Raises:
        UsageError: if a data set has no annotations or its classes are not the model's.
    """
    results = OrderedDict()
    for name in cfg.DATASETS.TEST:
        loader = build_detection_test_loader(cfg, name, mapper=RecordMapper(cfg, is_train=False))
        classes = list(MetadataCatalog.get(name).get("thing_classes", []))
        if not classes:
            raise UsageError(f"{name} of DATASETS.TEST has no annotations to evaluate with")
        check_classes({name: classes}, cfg.MODEL.ROI_HEADS.NUM_CLASSES)
        evaluator = _build_evaluator(cfg, name, keep_detections)
        results[name] = inference_on_dataset(model, loader, evaluator) or {}
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


def write_ground_truth(cfg: CfgNode) -> None:
    """Write what the test sets are evaluated with; to be called on all processes.

    As it was read, with areas where the annotations lack them, and anew in each run: a cached
    conversion outlives the annotations that it was made of. Training calls it before it starts: a
    disk that fills up later cannot end it then.

    Raises:
        UsageError: if it cannot be written.
    """
    for name in cfg.DATASETS.TEST:
        metadata = MetadataCatalog.get(name)
        DatasetCatalog.get(name)  # a COCO json says its classes when it is read
        if hasattr(metadata, "json_file") or not metadata.get("thing_classes"):
            continue
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        json_file = os.path.join(_inference_folder(cfg), f"ground_truth_{digest}.json")
        if comm.get_local_rank() == 0:  # machines may not share a disk
            try:
                convert_to_coco_json(name, json_file, allow_cached=False)
            except OSError as error:
                raise UsageError(f"cannot write {json_file}: {error.strerror}") from error
        comm.synchronize()
        metadata.json_file = json_file


def _inference_folder(cfg: CfgNode) -> str:
    return os.path.join(cfg.OUTPUT_DIR, "inference")


def _build_evaluator(cfg: CfgNode, name: str, keep_detections: bool) -> DatasetEvaluator:
    write_ground_truth(cfg)
    metadata = MetadataCatalog.get(name)
    folder = _inference_folder(cfg) if keep_detections else None
    coco = COCOEvaluator(name, tasks=("bbox",), output_dir=folder)
    if metadata.get("evaluator_type") != "pascal_voc" or not _devkit_reads(metadata):
        return coco
    return DatasetEvaluators([coco, ElevenPointEvaluator(name)])


def _devkit_reads(metadata: Metadata) -> bool:
    """Whether the annotations have all that Detectron2's Pascal VOC evaluator asks for."""
    folder = Path(metadata.dirname)
    ids = Path(split_file(metadata.dirname, metadata.split)).read_text().split()
    try:
        for image_id in ids:
            parse_rec(str(folder / "Annotations" / f"{image_id}.xml"))
    except (AttributeError, OSError, ValueError) as error:
        logger.warning("no 11-point AP for %s: %s", metadata.name, error)
        return False
    return True


def evaluate_teacher_and_student(
    cfg: CfgNode, teacher: nn.Module, student: nn.Module, *, alike: bool
) -> dict:
    """The teacher's results, and the student's under ``"student"``.

    Args:
        cfg: names the test sets.
        teacher, student: models; each is put back into the mode that it was in.
        alike: the two have the same weights (in burn-in): evaluate once.
    """
    # Detections are not kept: the student's would overwrite the teacher's, on a disk that may fill.
    results = evaluate(cfg, teacher, keep_detections=False)
    if alike:
        return {**results, "student": results}
    return {**results, "student": evaluate(cfg, student, keep_detections=False)}
