"""Training and evaluation: the step, the trainer, its hooks, checkpoints."""

from .checkpoint import load_for_evaluation
from .evaluation import evaluate
from .trainer import SemiSupervisedTrainer

__all__ = ["SemiSupervisedTrainer", "evaluate", "load_for_evaluation"]
