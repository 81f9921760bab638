"""Trainings of the tiny detector on a few images, which take about a second."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from detectron2.data.detection_utils import read_image
from detectron2.engine import HookBase
from detectron2.utils.logger import _cached_log_stream, setup_logger

from locreweight.data.training_sets import register_datasets
from locreweight.engine import SemiSupervisedTrainer, preemption
from locreweight.engine.console import LOGGED
from tests.modeling.tiny_model import tiny_config
from tests.tiny_data import make_coco, make_folder

TRAINING = {
    "SEMI.BURN_IN_ITERS": 2,
    "SEMI.EMA_KEEP_RATE": 0.6,
    # A random detector gives each class about the same score.
    "SEMI.PSEUDO_LABEL_THRESHOLD": 0.2,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.IMS_PER_BATCH_UNLABELED": 2,
    # Untrained weights need their batch statistics and small steps.
    "MODEL.RESNETS.NORM": "BN",
    "SOLVER.BASE_LR": 0.001,
    "SOLVER.WARMUP_ITERS": 0,
    "SOLVER.MAX_ITER": 4,
    "SOLVER.STEPS": (),
    "SOLVER.CHECKPOINT_PERIOD": 1000,
    "SOLVER.KEEP_CHECKPOINTS": 0,
    "TEST.EVAL_PERIOD": 0,
    "DATASETS.TEST": (),
    "VIS_PERIOD": 0,
}

# All methods, with what they need for two iterations, the first of which is burn-in.
METHODS: dict[str, dict] = {
    name: {}
    for name in (
        "LocReweight",
        "ShuffledLocReweight",
        "MeanLocReweight",
        "SoftTeacher",
        "UnbiasedTeacher",
        "STAC",
        "UnbiasedTeacherV2",
        "RPL",
        "CST",
        "ISMT",
    )
} | {
    # Enough images to mix. MixPL mixes once its cache is full, after the first step.
    "MUM": {"SOLVER.IMS_PER_BATCH_UNLABELED": 4},
    "InstantTeaching": {"SOLVER.IMS_PER_BATCH_UNLABELED": 4},
    "InstantTeachingStar": {"SOLVER.IMS_PER_BATCH_UNLABELED": 4},
    # The thresholds of LabelMatch change after the first step.
    "LabelMatch": {"SEMI.LABEL_MATCH.IMAGES": 2, "SOLVER.MAX_ITER": 3},
    "MixPL": {"SOLVER.IMS_PER_BATCH_UNLABELED": 8, "SOLVER.MAX_ITER": 3},
    "LocReweightMix": {"SOLVER.IMS_PER_BATCH_UNLABELED": 8, "SOLVER.MAX_ITER": 3},
}


def make_datasets(folder: Path) -> dict[str, list[str]]:
    """Write labeled, unlabeled and test images; returns the config keys that name them."""
    labeled = make_coco(folder / "labeled", images=5, seed=1)
    test = make_coco(folder / "test", images=3, seed=2)
    return {
        "DATASETS.TRAIN": ["coco:{}:{}".format(*labeled)],
        "DATASETS.UNLABELED": [f"folder:{make_folder(folder / 'unlabeled', images=5, seed=3)}"],
        "DATASETS.TEST": ["coco:{}:{}".format(*test)],
    }


def training_config(datasets: dict, output: Path, settings: dict | None = None):
    """A config without a test set, unless the settings name one."""
    named = {key: value for key, value in datasets.items() if key != "DATASETS.TEST"}
    return tiny_config(TRAINING | named | {"OUTPUT_DIR": str(output)} | (settings or {}))


def image_tensor(file: str | Path) -> torch.Tensor:
    """An image as the model's input at inference."""
    return torch.as_tensor(read_image(str(file), format="BGR").transpose(2, 0, 1).copy())


@torch.no_grad()
def detections_as_ground_truth(model, test_set: str, json_file: Path) -> str:
    """Make a test set whose ground truth are the model's detections on another test set's images.

    Only this model has an AP of 100 on it.
    """
    _, source, images = test_set.split(":")
    content = json.loads(Path(source).read_text())
    content["annotations"] = []
    for entry in content["images"]:
        pixels = image_tensor(Path(images) / entry["file_name"])
        detections = model.eval()([{"image": pixels}])[0]["instances"]
        boxes = detections.pred_boxes.tensor.tolist()
        classes = detections.pred_classes.tolist()
        for (x1, y1, x2, y2), label in zip(boxes, classes, strict=True):
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": entry["id"],
                    "category_id": label + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                }
            )
    json_file.write_text(json.dumps(content))
    return f"coco:{json_file}:{images}"


def build_trainer(
    cfg, resume: bool = False, trainer_class: type[SemiSupervisedTrainer] = SemiSupervisedTrainer
) -> SemiSupervisedTrainer:
    register_datasets(cfg)
    torch.manual_seed(cfg.SEED)
    trainer = trainer_class(cfg)
    trainer.resume_or_load(resume=resume)
    return trainer


@contextmanager
def restored_loggers_and_signals() -> Iterator[None]:
    """Restore loggers and signal handlers, which the command line changes for the process."""
    setup_logger.cache_clear()  # it adds handlers only once for each folder
    _cached_log_stream.cache_clear()  # the file may have been moved
    loggers = [logging.getLogger(name) for name in (*LOGGED, "torch")]
    before = [(logger.propagate, logger.handlers[:]) for logger in loggers]
    levels = [(handler, handler.level) for handler in logging.getLogger("torch").handlers]
    handlers = {number: signal.getsignal(number) for number in preemption.SIGNALS}
    try:
        yield
    finally:
        for logger, (propagate, own) in zip(loggers, before, strict=True):
            logger.propagate, logger.handlers = propagate, own
        for handler, level in levels:
            handler.setLevel(level)
        logging.captureWarnings(False)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def copy_of(module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(first: dict, second: dict) -> bool:
    """Bitwise equality of two state dicts."""
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


class Recorder(HookBase):
    """Records images, learning rate and weights of each iteration."""

    def __init__(self) -> None:
        self.students, self.teachers, self.images, self.rates = [], [], [], []
        self.results: dict[str, float] = {}  # of the last evaluation

    def before_train(self) -> None:
        def record_images(student, inputs):
            if not student.training:
                return
            labeled, unlabeled = [*inputs, None][:2]
            views = [x["image"] for x in [*labeled, *(unlabeled or [])]]
            self.images.append([(tuple(v.shape), int(v.long().sum())) for v in views])

        self.trainer.student.register_forward_pre_hook(record_images)

    def before_step(self) -> None:
        self.rates.append(self.trainer.optimizer.torch_optimizer.param_groups[0]["lr"])

    def after_step(self) -> None:
        self.students.append(copy_of(self.trainer.student))
        self.teachers.append(copy_of(self.trainer.teacher))


def recorded_training(trainer: SemiSupervisedTrainer) -> Recorder:
    """Train to the end; returns the record."""
    recorder = Recorder()
    trainer.register_hooks([recorder])
    recorder.results = trainer.train()
    # Stop the loader's workers. When the iterator is garbage-collected much later, it waits for
    # them for 5 seconds each.
    trainer._batches = None
    return recorder
