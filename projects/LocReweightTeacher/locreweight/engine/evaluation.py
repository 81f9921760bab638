"""Evaluate models on test sets: COCO-style average precision, and VOC's 11-point one."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from xml.etree import ElementTree

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.data.datasets.coco import convert_to_coco_dict
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
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from ..checkpoint.loading import check_weights_exist, read_description
from ..data.checks import (
    check_boxes,
    check_classes,
    check_same_classes,
    check_test_set,
    countable_boxes,
    describe_crowds,
    first_few,
    with_configured_names,
)
from ..data.datasets.file_names import printable_name
from ..data.datasets.voc import read_split
from ..data.mapper import RecordMapper
from ..data.training_sets import check_test_sets
from ..errors import UsageError
from ..run_files import ANALYSIS_FILE, ANALYSIS_FOLDER
from .console import prints_to_log
from .detection_analysis import DetectionAnalysis, analyze, write_analyses

logger = logging.getLogger(__name__)

F1, F1_THRESHOLD = "F1", "F1-threshold"  # names of metrics
_COCO_LIMIT = 100  # detections per image
_UNLIMITED = 10**6
_TABLE_METRICS = ("AP", "AP50", "AP75")
_MAX_AREA = 1e10  # of COCO's range "all", in square pixels


def evaluate(
    cfg: CfgNode,
    model: nn.Module,
    *,
    model_name: str = "the model",
    keep_detections: bool = True,
    analysis_file: Path | None = None,
    show_progress: bool = False,
) -> dict:
    """Evaluate a model on all ``DATASETS.TEST``; must be called on all processes.

    Args:
        cfg: names the test sets.
        model: its training or evaluation mode is restored.
        model_name: for the log, such as "the teacher".
        keep_detections: write detections and their analysis to ``OUTPUT_DIR/inference``.
        analysis_file: another file for the analysis (:mod:`.detection_analysis`).
        show_progress: show a progress bar if there is a terminal.

    Returns:
        On the main process ``{"bbox": {"AP": ..., "AP50": ..., ...}}`` in percent; datasets in
        Pascal VOC format also have ``"voc_11_point"``. ``F1`` is the highest F1 of all score
        thresholds and ``F1-threshold``, in [0, 1], that threshold; without correct detections they
        are absent. With several test sets, a dictionary of these by name. On other processes, the
        dictionaries are empty.

    Raises:
        UsageError: if a test set has no boxes to evaluate on or other classes than the model.
    """
    write_ground_truth(cfg)
    results = OrderedDict()
    analyses: dict[str, DetectionAnalysis] = {}
    for name in cfg.DATASETS.TEST:
        loader = build_detection_test_loader(cfg, name, mapper=RecordMapper(cfg, is_train=False))
        evaluator = _build_evaluator(cfg, name, keep_detections, analyses)
        logger.info("evaluating %s on %s", model_name, name)
        disable = None if show_progress and comm.is_main_process() else True  # None: no terminal
        batches = tqdm(loader, desc="evaluating", file=sys.stdout, disable=disable, leave=False)
        with prints_to_log():
            results[name] = inference_on_dataset(model, batches, evaluator) or {}
        if comm.is_main_process():
            print_csv_format(results[name])
            logger.info("results of %s on %s, %s", model_name, name, _describe_limit(cfg))
    if analysis_file is None and keep_detections:
        analysis_file = Path(_inference_folder(cfg), ANALYSIS_FILE)
    if analysis_file and comm.is_main_process():
        _write_analyses(analysis_file, analyses)
    return next(iter(results.values())) if len(results) == 1 else dict(results)


def evaluate_teacher_and_student(
    cfg: CfgNode, teacher: nn.Module, student: nn.Module, *, iteration: int, identical: bool
) -> dict:
    """Evaluate both models; must be called on all processes.

    Args:
        cfg: names the test sets.
        teacher, student: models. Their training or evaluation mode is restored.
        iteration: number of completed iterations, for the name of the teacher's analysis.
        identical: whether both have the same weights, as in burn-in. Then one evaluation suffices.

    Returns:
        the teacher's results as returned by :func:`evaluate`, and the student's as ``"student"``.
    """
    # The student's detections would overwrite the teacher's, and a disk that fills up during
    # training would end it.
    file = Path(cfg.OUTPUT_DIR, ANALYSIS_FOLDER, f"iter_{iteration:07d}.json")
    name = "the teacher, which is also the student," if identical else "the teacher"
    results = evaluate(cfg, teacher, model_name=name, keep_detections=False, analysis_file=file)
    if identical:
        return {**results, "student": results}
    students = evaluate(cfg, student, model_name="the student", keep_detections=False)
    return {**results, "student": students}


def check_evaluation(cfg: CfgNode) -> None:
    """Check the test sets, and that they have the classes of the checkpoint ``MODEL.WEIGHTS``.

    Must be called on all processes.

    Raises:
        UsageError: for problems of the data, or if class names or their order differ and
            ``DATASETS.CHECKS.ALLOW_OTHER_CLASS_NAMES`` is False.
    """
    check_test_sets(cfg)
    file = cfg.MODEL.WEIGHTS
    if not file or file.endswith(".pkl"):  # Detectron2's files do not name classes
        return
    check_weights_exist(file)
    description = read_description(file, trusted=cfg.MODEL.TRUST_WEIGHTS)
    if description and not cfg.DATASETS.CHECKS.ALLOW_OTHER_CLASS_NAMES:
        for name in cfg.DATASETS.TEST:
            _check_checkpoint_classes(
                file, description.class_names, name, list(MetadataCatalog.get(name).thing_classes)
            )


def _check_configured_classes(cfg: CfgNode, classes: dict[str, list[str]]) -> None:
    """Check that the test sets have the classes of ``DATASETS.CLASS_NAMES``, unless it is empty."""
    if cfg.DATASETS.CHECKS.ALLOW_OTHER_CLASS_NAMES:
        return
    try:
        check_same_classes(with_configured_names(cfg, classes))
    except UsageError as error:
        raise UsageError(
            f"{error}\nOr, if class i of the test set is class i of the model under another name, "
            "set DATASETS.CHECKS.ALLOW_OTHER_CLASS_NAMES True"
        ) from error


def _check_checkpoint_classes(
    file: str, trained: Sequence[str], name: str, tested: Sequence[str]
) -> None:
    if list(trained) == list(tested):
        return
    if sorted(trained) == sorted(tested):
        difference = "the same classes in another order"
        fix = "Sort the classes of the data set like those of the checkpoint (COCO: by category id)"
    else:
        difference = "other classes"
        fix = "Use data with the classes of the checkpoint"
    pairs = zip_longest(trained, tested, fillvalue="(none)")
    first, (there, here) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    raise UsageError(
        f"the test set {name} has {difference} than the checkpoint {file}, so detections would "
        f"count for wrong classes. Checkpoint: {first_few(trained)}. Test set: "
        f"{first_few(tested)}. Class {first} is {there!r} in the checkpoint, {here!r} in the test "
        f"set. {fix}. Or, if class i of the data means class i of the checkpoint under another "
        "name, set DATASETS.CHECKS.ALLOW_OTHER_CLASS_NAMES True"
    )


def main_metric(cfg: CfgNode) -> str:
    """Return the metric by which the best teacher is selected: AP on the first test set."""
    return "bbox/AP" if len(cfg.DATASETS.TEST) == 1 else f"{cfg.DATASETS.TEST[0]}/bbox/AP"


def threshold_metric(cfg: CfgNode) -> str:
    """Return the metric that is the score threshold with the best F1 on the first test set."""
    return main_metric(cfg).removesuffix("AP") + F1_THRESHOLD


class AnalyzingEvaluator(COCOEvaluator):
    """Detectron2's COCO evaluator, which also analyzes the detections."""

    def __init__(
        self, name: str, analyses: dict[str, DetectionAnalysis], **arguments: object
    ) -> None:
        """
        Args:
            name: test set.
            analyses: gets the analysis of the test set, unless there are no detections.
            arguments: of Detectron2's evaluator.
        """
        super().__init__(name, **arguments)
        self._name, self._analyses = name, analyses

    def _derive_coco_results(
        self, coco_eval: COCOeval | None, iou_type: str, class_names: list[str] | None = None
    ) -> dict[str, float]:
        results = super()._derive_coco_results(coco_eval, iou_type, class_names)
        if coco_eval is None:
            return results
        self._analyses[self._name] = analysis = analyze(coco_eval, class_names or [])
        if analysis.best is None:
            return results
        best = analysis.best
        logger.info("best F1 of %s: %.3f at scores above %.3f", self._name, best.f1, best.threshold)
        return {**results, F1: 100 * best.f1, F1_THRESHOLD: best.threshold}


def count_test_images(cfg: CfgNode) -> int:
    """Number of images in ``DATASETS.TEST``; call it after :func:`write_ground_truth`."""
    return sum(MetadataCatalog.get(name).num_images for name in cfg.DATASETS.TEST)


def results_table(results: dict) -> str:
    """Return a table of the results of :func:`evaluate`, in percent."""
    is_single = all(isinstance(v, float) for v in next(iter(results.values())).values())
    by_name = {"": results} if is_single else results
    rows = [
        [" ".join(filter(None, [name, task])), *(values.get(metric) for metric in _TABLE_METRICS)]
        for name, tasks in by_name.items()
        for task, values in tasks.items()
    ]
    return tabulate(rows, headers=["", *_TABLE_METRICS], tablefmt="github", floatfmt=".2f")


def describe_results(results: dict, metric: str, best: float | None, *, identical: bool) -> str:
    """Describe an evaluation in a few words.

    Args:
        results: as returned by :func:`evaluate_teacher_and_student`.
        metric: as returned by :func:`main_metric`.
        best: the best teacher's AP before; None if there was none.
        identical: whether teacher and student have the same weights.
    """
    teacher, student = (_main_value(each, metric) for each in (results, results["student"]))
    text = f"teacher AP {teacher:.1f}, student {student:.1f}"
    if identical:
        text = f"AP {teacher:.1f}"
    return f"{text} (best {max(teacher, best or 0.0):.1f})"


def _main_value(results: dict, metric: str) -> float:
    *test_set, task, name = metric.rsplit("/", 2)
    value = (results[test_set[0]] if test_set else results)[task][name]
    return 0.0 if math.isnan(value) else value  # Detectron2's AP without detections is NaN


class ElevenPointEvaluator(PascalVOCDetectionEvaluator):
    """11-point AP of Pascal VOC 2007. Its name differs from that of the COCO-style AP.

    As in COCO, it is the mean over the classes that occur in the test set. Detectron2 counts other
    classes as 0.
    """

    _class_names: list[str]
    _predictions: dict[int, list[str]]

    def __init__(self, name: str) -> None:
        super().__init__(name)
        metadata = MetadataCatalog.get(name)
        self._image_ids = read_split(metadata.dirname, metadata.split, allow_outside=True)

    def find_problem(self) -> str:
        """Why the annotations lack what Detectron2's evaluator needs; empty if they do not."""
        try:
            names = {entry["name"] for entry in self._objects()}
        except (AttributeError, OSError, ValueError, ElementTree.ParseError) as error:
            return str(error)
        for image_id in self._image_ids:
            if len(image_id.split()) > 1:
                return f"there are spaces in the image name {image_id!r}"
        for name in names:
            if name != name.strip():
                return f"there are spaces around the class name {name!r} in the annotations"
        return ""

    def evaluate(self) -> dict | None:
        names = {entry["name"] for entry in self._objects() if not entry["difficult"]}
        occurring = [i for i, name in enumerate(self._class_names) if name in names]
        self._predictions = {i: self._predictions.get(old, []) for i, old in enumerate(occurring)}
        self._class_names = [self._class_names[i] for i in occurring]
        with tempfile.TemporaryDirectory() as folder:
            # Detectron2 cannot read image lists with byte order marks or flags: write a plain one.
            self._image_set_path = os.path.join(folder, "images.txt")
            Path(self._image_set_path).write_text("".join(f"{i}\n" for i in self._image_ids))
            results = super().evaluate()
        return results and {"voc_11_point": results["bbox"]}

    def _objects(self) -> list[dict]:
        files = (self._anno_file_template.format(image_id) for image_id in self._image_ids)
        return [entry for file in files for entry in parse_rec(file)]


def write_ground_truth(cfg: CfgNode) -> None:
    """Check the test sets and write their ground truth; must be called on all processes.

    Masks are ignored. Boxes without area or outside of their image, which no detector can find, are
    left out. The files are written in each run, because a cached file might be older than the
    annotations. Training calls this at startup, so that a disk that is full later does not end it.
    A test set that is registered in Detectron2 with a COCO json is evaluated with that file as it
    is.

    Raises:
        UsageError: if a test set has no box to evaluate on, other classes than
            ``DATASETS.CLASS_NAMES`` or another number of classes than the model, or the ground
            truth cannot be written.
    """
    classes = {}
    for name in cfg.DATASETS.TEST:
        metadata = MetadataCatalog.get(name)
        if metadata.get("ground_truth_is_ready") and metadata.get("json_file"):
            classes[name] = list(metadata.thing_classes)
            continue
        records = DatasetCatalog.get(name)  # a COCO json says its classes when it is read
        classes[name] = list(metadata.get("thing_classes", []))
        if not classes[name]:
            raise UsageError(f"{name} of DATASETS.TEST has no annotations to evaluate with")
        check_test_set(name, records)
        _log_uncounted(cfg, name, records)
        if not metadata.get("json_file"):
            json_file = os.path.join(_inference_folder(cfg), f"ground_truth_{_digest(name)}.json")
            if comm.get_local_rank() == 0:  # machines may not share a disk
                _write_ground_truth(json_file, name, records)
            comm.synchronize()
            metadata.json_file = json_file
        metadata.ground_truth_is_ready = True
        metadata.num_images = len(records)
    if classes:
        _check_configured_classes(cfg, classes)
        check_classes(classes, cfg.MODEL.ROI_HEADS.NUM_CLASSES)


def _write_ground_truth(json_file: str, name: str, records: Sequence[dict]) -> None:
    annotations = [annotation for record in records for annotation in record.get("annotations", [])]
    countable = {id(annotation) for record in records for annotation in countable_boxes(record)}
    content = convert_to_coco_dict(name)
    converted = []
    for source, entry in zip(annotations, content["annotations"], strict=True):
        width, height = entry["bbox"][2:]
        # An area of 0 is a placeholder. COCO ignores boxes with a larger area than the limit.
        entry["area"] = min(source.get("area") or width * height, _MAX_AREA)
        if source.get("iscrowd", 0) or id(source) in countable:
            converted.append(entry)
    content["annotations"] = converted
    try:
        Path(json_file).parent.mkdir(parents=True, exist_ok=True)
        Path(json_file).write_text(json.dumps(content))
    except OSError as error:
        raise UsageError(f"cannot write {json_file}: {error.strerror}") from error


def _log_uncounted(cfg: CfgNode, name: str, records: list[dict]) -> None:
    """Log boxes that evaluation ignores, and images with more boxes than detections."""
    consequence = "Evaluation ignores them: a detection of one is neither correct nor wrong"
    if crowds := describe_crowds(f"the test set {name}", records, consequence):
        logger.info("%s", crowds)
    check_boxes(records, drop_bad=True)  # logs boxes without area or outside of their image
    limit = cfg.TEST.DETECTIONS_PER_IMAGE
    numbers = {record["file_name"]: sum(1 for _ in countable_boxes(record)) for record in records}
    above = [file for file, number in numbers.items() if number > limit >= 0]
    if above:
        largest = max(above, key=numbers.__getitem__)
        logger.warning(
            "%d of %d images of the test set %s have more boxes than TEST.DETECTIONS_PER_IMAGE %d, "
            "such as %s with %d: no detector can reach an AP of 100. Set "
            "TEST.DETECTIONS_PER_IMAGE %d",
            len(above),
            len(records),
            name,
            limit,
            printable_name(largest),
            numbers[largest],
            numbers[largest],
        )


def _describe_limit(cfg: CfgNode) -> str:
    limit = cfg.TEST.DETECTIONS_PER_IMAGE
    if limit < 0:
        return "no limit of detections per image"
    return f"at most {limit} detections per image (TEST.DETECTIONS_PER_IMAGE)"


def _max_detections(cfg: CfgNode) -> int:
    """Detections that COCO's metric counts in each image, at least its usual 100."""
    limit = cfg.TEST.DETECTIONS_PER_IMAGE
    return _UNLIMITED if limit < 0 else max(limit, _COCO_LIMIT)


def _inference_folder(cfg: CfgNode) -> str:
    return os.path.join(cfg.OUTPUT_DIR, "inference")


def _detections_folder(cfg: CfgNode, name: str) -> str:
    """The folder for the detections of a test set; with several, each has a separate one."""
    folder = _inference_folder(cfg)
    if len(cfg.DATASETS.TEST) == 1:
        return folder
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", name)[-60:].strip("-.")
    return os.path.join(folder, f"{readable}-{_digest(name)}")


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:8]


def _write_analyses(file: Path, analyses: dict[str, DetectionAnalysis]) -> None:
    try:
        if analyses:
            write_analyses(file, analyses)
        else:
            file.unlink(missing_ok=True)  # of an earlier evaluation
    except OSError as error:  # a full disk must not end training
        logger.error("cannot write %s: %s", file, error)


def _build_evaluator(
    cfg: CfgNode, name: str, keep_detections: bool, analyses: dict[str, DetectionAnalysis]
) -> DatasetEvaluator:
    metadata = MetadataCatalog.get(name)
    coco = AnalyzingEvaluator(
        name,
        analyses,
        tasks=("bbox",),
        output_dir=_detections_folder(cfg, name) if keep_detections else None,
        max_dets_per_image=_max_detections(cfg),
    )
    if metadata.get("evaluator_type") != "pascal_voc":
        return coco
    eleven_point = ElevenPointEvaluator(name)
    if problem := eleven_point.find_problem():
        logger.warning("no 11-point AP for %s: %s", name, problem)
        return coco
    return DatasetEvaluators([coco, eleven_point])
