"""Training and evaluation."""

from ..checkpoint.loading import load_for_evaluation
from .evaluation import check_evaluation, evaluate
from .launch import argument_parser, launch
from .startup_checks import check_device
from .trainer import SemiSupervisedTrainer

__all__ = [
    "SemiSupervisedTrainer",
    "argument_parser",
    "check_device",
    "check_evaluation",
    "evaluate",
    "launch",
    "load_for_evaluation",
]
