"""Trainings of the tiny detector on a few images, a matter of seconds."""

from __future__ import annotations

from pathlib import Path

import torch
from detectron2.engine import HookBase

from locreweight.data.training_sets import register_datasets
from locreweight.engine import SemiSupervisedTrainer
from tests.modeling.tiny_model import tiny_config
from tests.tiny_data import make_coco, make_folder

TRAINING = {
    "SEMI.BURN_IN_ITERS": 2,
    "SEMI.EMA_KEEP_RATE": 0.6,
    # A random detector's detections are about as likely as any class.
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
    "TEST.EVAL_PERIOD": 0,
    "DATASETS.TEST": (),
}


def make_datasets(folder: Path) -> dict[str, list[str]]:
    """Labeled, unlabeled and test images on disk; the config keys that name them."""
    labeled = make_coco(folder / "labeled", images=5, seed=1)
    test = make_coco(folder / "test", images=3, seed=2)
    return {
        "DATASETS.TRAIN": ["coco:{}:{}".format(*labeled)],
        "DATASETS.UNLABELED": [f"folder:{make_folder(folder / 'unlabeled', images=5, seed=3)}"],
        "DATASETS.TEST": ["coco:{}:{}".format(*test)],
    }


def training_config(datasets: dict, output: Path, settings: dict | None = None):
    """Without a test set unless the settings name one."""
    named = {key: value for key, value in datasets.items() if key != "DATASETS.TEST"}
    return tiny_config(TRAINING | named | {"OUTPUT_DIR": str(output)} | (settings or {}))


def build_trainer(cfg, resume: bool = False) -> SemiSupervisedTrainer:
    register_datasets(cfg)
    torch.manual_seed(cfg.SEED)
    trainer = SemiSupervisedTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    return trainer


def copy_of(module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(first: dict, second: dict) -> bool:
    """Bitwise equality of two state dicts."""
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


class Recorder(HookBase):
    """What went in and what came out of each iteration.

    Draws of anchors and proposals follow from the iteration, so that two runs can be compared.
    """

    def __init__(self) -> None:
        self.students, self.teachers, self.images, self.rates = [], [], [], []

    def before_train(self) -> None:
        def note(student, inputs):
            if not student.training:
                return
            labeled, unlabeled = [*inputs, None][:2]
            views = [x["image"] for x in [*labeled, *(unlabeled or [])]]
            self.images.append([(tuple(v.shape), int(v.long().sum())) for v in views])

        self.trainer.student.register_forward_pre_hook(note)

    def before_step(self) -> None:
        torch.manual_seed(self.trainer.iter)
        self.rates.append(self.trainer.optimizer.param_groups[0]["lr"])

    def after_step(self) -> None:
        self.students.append(copy_of(self.trainer.student))
        self.teachers.append(copy_of(self.trainer.teacher))


def recorded_training(trainer: SemiSupervisedTrainer) -> Recorder:
    """Trains to the end."""
    recorder = Recorder()
    trainer.register_hooks([recorder])
    trainer.train()
    return recorder
