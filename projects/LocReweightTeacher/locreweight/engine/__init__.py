"""Training and evaluation: the step, the trainer, its hooks, checkpoints."""

from ..checkpoint.checkpointer import load_for_evaluation
from .evaluation import evaluate
from .launch import argument_parser, check_device, launch
from .trainer import SemiSupervisedTrainer

__all__ = [
    "SemiSupervisedTrainer",
    "argument_parser",
    "check_device",
    "evaluate",
    "launch",
    "load_for_evaluation",
]
