"""Evaluate models on test sets: COCO-style average precision, and VOC's 11-point one."""

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
    """Evaluate a model on all ``DATASETS.TEST``; must be called on all processes.

    Args:
        cfg: names the test sets.
        model: its training or evaluation mode is restored.
        keep_detections: write detections to ``OUTPUT_DIR/inference``.

    Returns:
        On the main process ``{"bbox": {"AP": ..., "AP50": ..., ...}}`` in percent; datasets in
        Pascal VOC format also have ``"voc_11_point"``. With several test sets, a dictionary of
        these by name. On other processes, the dictionaries are empty.

    Raises:
        UsageError: if a test set has no annotations or other classes than the model.
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


def evaluate_teacher_and_student(
    cfg: CfgNode, teacher: nn.Module, student: nn.Module, *, alike: bool
) -> dict:
    """Evaluate both models; must be called on all processes.

    Args:
        cfg: names the test sets.
        teacher, student: models. Their training or evaluation mode is restored.
        alike: whether both have the same weights, as in burn-in. Then one evaluation suffices.

    Returns:
        the teacher's results as returned by :func:`evaluate`, and the student's as ``"student"``.
    """
    # The student's detections would overwrite the teacher's, and a disk that fills up during
    # training would end it.
    results = evaluate(cfg, teacher, keep_detections=False)
    if alike:
        return {**results, "student": results}
    return {**results, "student": evaluate(cfg, student, keep_detections=False)}


def main_metric(cfg: CfgNode) -> str:
    """Return the metric by which the best teacher is selected: AP on the first test set."""
    return "bbox/AP" if len(cfg.DATASETS.TEST) == 1 else f"{cfg.DATASETS.TEST[0]}/bbox/AP"


class ElevenPointEvaluator(PascalVOCDetectionEvaluator):
    """11-point AP of Pascal VOC 2007. Its name differs from that of the COCO-style AP."""

    def evaluate(self) -> dict | None:
        results = super().evaluate()
        return results and {"voc_11_point": results["bbox"]}


def write_ground_truth(cfg: CfgNode) -> None:
    """Write the ground truth of the test sets as COCO json; must be called on all processes.

    Areas are added where the annotations lack them. The files are written in each run, because a
    cached file might be older than the annotations. Training calls this at startup, so that a disk
    that is full later does not end it.

    Raises:
        UsageError: if a file cannot be written.
    """
    for name in cfg.DATASETS.TEST:
        metadata = MetadataCatalog.get(name)
        DatasetCatalog.get(name)  # reading a COCO json sets its classes
        if hasattr(metadata, "json_file") or not metadata.get("thing_classes"):
            continue
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        json_file = os.path.join(_inference_folder(cfg), f"ground_truth_{digest}.json")
        if comm.get_local_rank() == 0:  # each machine may have its own disk
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
    if metadata.get("evaluator_type") != "pascal_voc" or not _can_read_voc(metadata):
        return coco
    return DatasetEvaluators([coco, ElevenPointEvaluator(name)])


def _can_read_voc(metadata: Metadata) -> bool:
    """Return whether Detectron2's Pascal VOC evaluator can read the annotations."""
    folder = Path(metadata.dirname)
    ids = Path(split_file(metadata.dirname, metadata.split)).read_text().split()
    try:
        for image_id in ids:
            parse_rec(str(folder / "Annotations" / f"{image_id}.xml"))
    except (AttributeError, OSError, ValueError) as error:
        logger.warning("11-point AP of %s is not computed: %s", metadata.name, error)
        return False
    return True
