"""Training hooks: evaluation, checkpoints, early stopping, and a warning of no pseudo-labels."""

from __future__ import annotations

import logging
from itertools import takewhile

from detectron2.engine import HookBase
from detectron2.engine.hooks import BestCheckpointer, EvalHook, PeriodicCheckpointer
from detectron2.utils import comm
from fvcore.common.checkpoint import Checkpointer

from ..checkpoint.checkpointer import FINAL
from .preemption import Stopped
from .training_step import HIGHEST_SCORE

logger = logging.getLogger(__name__)


class PreemptionCheckpoint(HookBase):
    """Saves a checkpoint before each evaluation, and before exiting when a stop was requested."""

    NAME = "model_resume"  # overwritten each time

    def __init__(self, checkpointer: Checkpointer, evaluation: PeriodicEvaluation | None) -> None:
        self._checkpointer = checkpointer
        self._evaluation = evaluation

    def after_step(self) -> None:
        stop = self.trainer.stop_agreed
        if stop or (self._evaluation and self._evaluation.is_due()):
            self._checkpointer.save(self.NAME)
        if stop:
            # The first process that exits ends the others, so all wait until the file is written.
            comm.synchronize()
            raise Stopped


class PeriodicEvaluation(EvalHook):
    """Detectron2's EvalHook, with the last evaluation in ``after_step`` instead of ``after_train``.

    The last evaluation is then part of the last iteration and is repeated if it was interrupted.
    """

    def is_due(self) -> bool:
        """Whether to evaluate after the current iteration."""
        done = self.trainer.iter + 1
        periodic = self._period > 0 and done % self._period == 0
        return periodic or done == self.trainer.max_iter

    def after_step(self) -> None:
        if self.is_due():
            self._do_eval()

    def after_train(self) -> None:
        """Do nothing. Detectron2 evaluates here, even after an error in the last iteration."""


class ResumableBestCheckpointer(BestCheckpointer):
    """Detectron2's BestCheckpointer, which also restores the best result when resuming."""

    def after_step(self) -> None:
        _, evaluated = self.trainer.storage.latest().get(self._val_metric, (0.0, -1))
        if evaluated == self.trainer.iter:
            self._best_checking()

    def after_train(self) -> None:
        """Do nothing: the last evaluation is part of the last iteration."""

    def _best_checking(self) -> None:
        latest = self.trainer.storage.latest().get(self._val_metric)
        if latest is None or (self.best_metric is not None and latest[0] <= self.best_metric):
            super()._best_checking()  # logs why nothing is saved
            return
        before = self.state_dict()
        if not self._update_best(*latest):
            return
        # Detectron2 updates the best result after saving, so the file would have the previous one.
        if self._checkpointer.save(self._file_prefix):
            logger.info("best %s so far: %.3f", self._val_metric, self.best_metric)
        else:
            # The disk is full. The best result remains the one of the existing file.
            self.load_state_dict(before)

    def state_dict(self) -> dict:
        return {"best_metric": self.best_metric, "best_iter": self.best_iter}

    def load_state_dict(self, state: dict) -> None:
        self.best_metric, self.best_iter = state["best_metric"], state["best_iter"]


def is_patience_over(
    done: int, improved_at: int, *, patience: int, eval_period: int, burn_in: int
) -> bool:
    """Whether early stopping ends a training.

    Args:
        done: number of completed iterations.
        improved_at: number of iterations before the best evaluation.
        patience: ``SOLVER.EARLY_STOPPING_PATIENCE``, in evaluations; 0 for no early stopping.
        eval_period: iterations between evaluations.
        burn_in: iterations of burn-in, which do not count; 0 if all of training is burn-in.
    """
    if not patience or done % eval_period:
        return False
    return done - max(improved_at, burn_in) >= patience * eval_period


class EarlyStopping(HookBase):
    """Decides that training ends because the teacher has not become better for some evaluations.

    The trainer ends in the iteration in which :meth:`is_due` is true, after all hooks.
    """

    def __init__(
        self, best: ResumableBestCheckpointer, *, patience: int, eval_period: int, burn_in: int
    ) -> None:
        """
        Args:
            best: runs before this hook.
            patience, eval_period, burn_in: as for :func:`is_patience_over`.
        """
        self._best = best
        self._patience = patience
        self._period = eval_period
        self._burn_in = burn_in
        self._improved_at = 0  # number of iterations before the best evaluation

    def after_step(self) -> None:
        if self._patience and (self.trainer.iter + 1) % self._period == 0:
            # Only the main process knows the results.
            best_iter = comm.all_gather(self._best.best_iter)[0]
            self._improved_at = 0 if best_iter is None else best_iter + 1

    def is_due(self, done: int) -> bool:
        """Whether training ends after ``done`` iterations; the same in all processes."""
        return is_patience_over(
            done,
            self._improved_at,
            patience=self._patience,
            eval_period=self._period,
            burn_in=self._burn_in,
        )

    def state_dict(self) -> dict:
        return {"improved_at": self._improved_at}

    def load_state_dict(self, state: dict) -> None:
        self._improved_at = state["improved_at"]


class PeriodicCheckpoint(PeriodicCheckpointer):
    """Detectron2's PeriodicCheckpointer without the final file; see :class:`FinalCheckpoint`.

    A period of 0 means never, as for the other periods.
    """

    def after_step(self) -> None:
        if self.period > 0:
            super().after_step()

    def before_train(self) -> None:
        """Do nothing. Detectron2 sets the last iteration here, in which it saves the final file."""


class FinalCheckpoint(HookBase):
    """Saves the final checkpoint in the last iteration.

    This is a hook by itself, so that a run that was stopped between the last periodic checkpoint
    and the final one saves the latter when it is resumed.
    """

    def __init__(self, checkpointer: Checkpointer) -> None:
        self._checkpointer = checkpointer

    def after_step(self) -> None:
        if self.trainer.is_last_iteration:
            self._checkpointer.save(FINAL, iteration=self.trainer.iter)


class NoPseudoLabelWarning(HookBase):
    """Warns once if the teacher makes no pseudo-labels for a long time."""

    def __init__(self, threshold: float, patience: int = 500) -> None:
        """
        Args:
            threshold: ``SEMI.PSEUDO_LABEL_THRESHOLD``.
            patience: number of iterations in a row without pseudo-labels before the warning.
                Burn-in does not count.
        """
        self._threshold = threshold
        self._patience = patience
        self._without = 0  # iterations in a row
        self._highest = 0.0  # score in these iterations
        self._warned = False
        self._last_iteration = -1  # of the metrics that were read

    def before_train(self) -> None:
        self._last_iteration = self.trainer.start_iter - 1

    def after_step(self) -> None:
        histories = self.trainer.storage.histories()
        if self._warned or "pseudo_labels/per_image" not in histories:  # absent during burn-in
            return
        # Metrics are deferred: those of several iterations arrive together.
        newest_first = zip(
            reversed(histories["pseudo_labels/per_image"].values()),
            reversed(histories[HIGHEST_SCORE].values()),
            strict=True,
        )
        new = list(takewhile(lambda pair: pair[0][1] > self._last_iteration, newest_first))
        for (per_image, iteration), (highest, _) in reversed(new):
            self._last_iteration = iteration
            if not self._warned:
                self._update(per_image, highest)

    def _update(self, per_image: float, highest: float) -> None:
        if per_image > 0:
            self._without, self._highest = 0, 0.0
            return
        self._without += 1
        self._highest = max(self._highest, highest)
        if self._without >= self._patience:
            self._warned = True
            logger.warning(
                "there were no pseudo-labels in the last %d iterations, so the unlabeled images "
                "add no objects to training: the highest score of a detection was %.3f, and "
                "SEMI.PSEUDO_LABEL_THRESHOLD is %.2f. Lower the threshold, or start from a better "
                "teacher: longer SEMI.BURN_IN_ITERS, pretrained MODEL.WEIGHTS or more labels",
                self._without,
                self._highest,
                self._threshold,
            )

    def state_dict(self) -> dict:
        return {"without": self._without, "highest": self._highest, "warned": self._warned}

    def load_state_dict(self, state: dict) -> None:
        self._without, self._highest = state["without"], state["highest"]
        self._warned = state["warned"]
