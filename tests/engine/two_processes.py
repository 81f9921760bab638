"""What each of two processes does in test_two_processes.py; importable by both."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from detectron2.utils import comm

from locreweight.data.training_sets import register_datasets
from locreweight.engine import SemiSupervisedTrainer, evaluate
from locreweight.engine import trainer as trainer_module
from locreweight.engine.training_step import training_step
from tests.engine.tiny_training import (
    Recorder,
    copy_of,
    found_as_truth,
    training_config,
)

SETTINGS = {
    "SEMI.BURN_IN_ITERS": 1,
    "DATASETS.LABELED_PERCENT": 60.0,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.IMS_PER_BATCH_UNLABELED": 4,
    # So slow that the teacher still finds something in the end.
    "SOLVER.BASE_LR": 0.0001,
    "SOLVER.MAX_ITER": 10,
    # One of the processes finds no pseudo-label, which must keep neither from going on.
    "SEMI.PSEUDO_LABEL_THRESHOLD": 0.2,
}
WITHOUT_LABELS = 1  # rank
# A loss of one process, and a gradient of the other, are not finite in these iterations.
LOSS_GONE_WRONG, GRADIENT_GONE_WRONG = (0, 3), (1, 5)  # rank, iteration


def train(datasets: dict, folder: Path) -> None:
    """Train, write what this process has in the end, then evaluate on a set that is solved."""
    rank = comm.get_rank()
    cfg = training_config(datasets, folder, SETTINGS)
    register_datasets(cfg)
    torch.manual_seed(cfg.SEED + rank)
    trainer = SemiSupervisedTrainer(cfg)
    trainer.resume_or_load(resume=False)
    start = copy_of(trainer.student)
    if rank == WITHOUT_LABELS:
        trainer.settings.method.pseudo_label_threshold = 1.0
    recorder = Recorder()
    trainer.register_hooks([recorder])
    mine = {}

    def step(*arguments):
        result = training_step(*arguments)
        mine.update({n: v.item() for n, v in (result.losses | result.metrics).items()})
        if (rank, trainer.iter) == LOSS_GONE_WRONG:
            result.losses["loss_cls"] = result.losses["loss_cls"] * math.nan
        if (rank, trainer.iter) == GRADIENT_GONE_WRONG:
            result.losses["loss_cls"].register_hook(lambda gradient: gradient * math.nan)
        return result

    trainer_module.training_step = step
    trainer.train()

    solved = folder / "solved.json"
    if comm.is_main_process():
        found_as_truth(trainer.teacher, datasets["DATASETS.TEST"][0], solved)
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
        "mine": mine,  # what this process measured in the last iteration
        "logged": {name: value for name, (value, _) in trainer.storage.latest().items()},
        "results": {name: dict(scores) for name, scores in results.items()},
        "students_results": {name: dict(scores) for name, scores in students.items()},
        "students": recorder.students,
        "teachers": recorder.teachers,
        "labeled": [record["file_name"] for record in trainer.sets.labeled],
    }
    torch.save(state, folder / f"rank_{rank}.pt")
