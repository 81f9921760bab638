"""The training that each process runs in test_two_processes.py; importable by both."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from detectron2.config import configurable
from detectron2.utils import comm

from locreweight.data.training_sets import register_datasets
from locreweight.engine import SemiSupervisedTrainer, evaluate
from locreweight.engine import trainer as trainer_module
from locreweight.engine.training_step import training_step
from locreweight.methods import METHOD_REGISTRY
from locreweight.methods.loc_reweight import LocReweight
from tests.engine.tiny_training import (
    Recorder,
    copy_of,
    detections_as_ground_truth,
    training_config,
)


@METHOD_REGISTRY.register()
class FileRecorder(LocReweight):
    """The paper's method. Its state is the list of all unlabeled files so far."""

    @configurable
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.files = []

    def observe(self, inputs, pseudo_labels):
        assert len(pseudo_labels) == len(inputs.samples)
        return [sample.file_name for sample in inputs.samples]

    def update_state(self, observations):
        self.files += [file for files in observations for file in files]

    def state_dict(self):
        return {"files": self.files}

    def load_state_dict(self, state_dict):
        self.files = state_dict["files"]


SETTINGS = {
    "SEMI.METHOD": "FileRecorder",
    "SEMI.BURN_IN_ITERS": 1,
    "DATASETS.LABELED_PERCENT": 60.0,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.IMS_PER_BATCH_UNLABELED": 4,
    # Low, so that the teacher still has detections in the end.
    "SOLVER.BASE_LR": 0.0001,
    "SOLVER.MAX_ITER": 8,
    # One of the processes gets no pseudo-labels; both must continue.
    "SEMI.PSEUDO_LABEL_THRESHOLD": 0.2,
}
RANK_WITHOUT_LABELS = 1
# Rank and iteration in which a loss of one process, and a gradient of the other, is NaN.
NAN_LOSS, NAN_GRADIENT = (0, 3), (1, 5)


# Images, boxes, classes, scores and certainties in a cache.
CACHE = {
    "SEMI.METHOD": "LocReweightMix",
    "SEMI.BURN_IN_ITERS": 0,
    "SOLVER.IMS_PER_BATCH_UNLABELED": 4,
    "SOLVER.MAX_ITER": 4,
}


# Two students that share a backbone, and a memory of the pseudo-labels of each file.
MEMBERS = {
    "SEMI.METHOD": "ISMT",
    "SEMI.BURN_IN_ITERS": 1,
    "SOLVER.IMS_PER_BATCH_UNLABELED": 4,
    "SOLVER.MAX_ITER": 4,
}


def train_short(datasets: dict, folder: Path, settings: dict) -> SemiSupervisedTrainer:
    """Train with a method; returns the trainer."""
    cfg = training_config(datasets, folder, settings)
    register_datasets(cfg)
    torch.manual_seed(cfg.SEED + comm.get_rank())
    trainer = SemiSupervisedTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    return trainer


def train_with_cache(datasets: dict, folder: Path) -> dict:
    """Train with cached images; returns the cache and the student."""
    trainer = train_short(datasets, folder, CACHE)
    return {"cache": trainer.settings.method.cache, "cache_student": copy_of(trainer.student)}


def train_with_members(datasets: dict, folder: Path) -> dict:
    """Train two students; returns all students and teachers, and the memory."""
    trainer = train_short(datasets, folder, MEMBERS)
    return {
        "members": [copy_of(trainer.models.students), copy_of(trainer.models.teachers)],
        "memory": trainer.settings.method.memory,
    }


def train(datasets: dict, folder: Path) -> None:
    """Train, evaluate on a test set that the teacher solves, and save this process's state."""
    rank = comm.get_rank()
    cfg = training_config(datasets, folder, SETTINGS)
    register_datasets(cfg)
    torch.manual_seed(cfg.SEED + rank)
    trainer = SemiSupervisedTrainer(cfg)
    trainer.resume_or_load(resume=False)
    start = copy_of(trainer.student)
    if rank == RANK_WITHOUT_LABELS:
        trainer.settings.method.pseudo_label_threshold = 1.0
    recorder = Recorder()
    trainer.register_hooks([recorder])
    own_metrics = {}

    def step(*arguments):
        result = training_step(*arguments)
        own_metrics.update({n: v.item() for n, v in (result.losses | result.metrics).items()})
        if (rank, trainer.iter) == NAN_LOSS:
            result.losses["loss_cls"] = result.losses["loss_cls"] * math.nan
        if (rank, trainer.iter) == NAN_GRADIENT:
            result.losses["loss_cls"].register_hook(lambda gradient: gradient * math.nan)
        return result

    trainer_module.training_step = step
    trainer.train()
    trainer_module.training_step = training_step

    solved = folder / "solved.json"
    if comm.is_main_process():
        detections_as_ground_truth(trainer.teacher, datasets["DATASETS.TEST"][0], solved)
    comm.synchronize()
    images = datasets["DATASETS.TEST"][0].rpartition(":")[2]
    test_cfg = training_config(datasets, folder, {"DATASETS.TEST": [f"coco:{solved}:{images}"]})
    register_datasets(test_cfg)
    results = evaluate(test_cfg, trainer.teacher)
    students = evaluate(test_cfg, trainer.student)

    state = {
        "start": start,
        "student": copy_of(trainer.student),
        "teacher": copy_of(trainer.teacher),
        "images": recorder.images,
        "own_metrics": own_metrics,  # of this process in the last iteration
        "logged": {name: value for name, (value, _) in trainer.storage.latest().items()},
        "results": {name: dict(scores) for name, scores in results.items()},
        "students_results": {name: dict(scores) for name, scores in students.items()},
        "files": trainer.settings.method.files,
        "students": recorder.students,
        "teachers": recorder.teachers,
        "labeled": [record["file_name"] for record in trainer.sets.labeled],
    }
    state |= train_with_cache(datasets, folder / "cache")
    state |= train_with_members(datasets, folder / "ismt")
    torch.save(state, folder / f"rank_{rank}.pt")
