"""Hooks of the trainer that Detectron2 does not have."""

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
    """Saves a checkpoint before each evaluation, and one to leave with when asked to stop."""

    NAME = "model_resume"  # written again and again

    def __init__(self, checkpointer: Checkpointer, evaluation: PeriodicEvaluation | None) -> None:
        self._checkpointer = checkpointer
        self._evaluation = evaluation

    def after_step(self) -> None:
        stop = self.trainer.stop_agreed
        if stop or (self._evaluation and self._evaluation.is_due()):
            self._checkpointer.save(self.NAME)
        if stop:
            # The first process that leaves ends the others: none may before the file is written.
            comm.synchronize()
            raise Stopped


class PeriodicEvaluation(EvalHook):
    """Detectron2's, but the last evaluation belongs to the last iteration, as all others do.

    So there is nothing left to do once training is over, and nothing that a stop could lose.
    """

    def is_due(self) -> bool:
        done = self.trainer.iter + 1
        periodic = self._period > 0 and done % self._period == 0
        return periodic or done == self.trainer.max_iter

    def after_step(self) -> None:
        if self.is_due():
            self._do_eval()

    def after_train(self) -> None:
        """Nothing; Detectron2's evaluates now, even after a failure in the last iteration."""


class ResumableBestCheckpointer(BestCheckpointer):
    """Detectron2's, but a resumed run remembers the best result so far."""

    def after_step(self) -> None:
        _, evaluated = self.trainer.storage.latest().get(self._val_metric, (0.0, -1))
        if evaluated == self.trainer.iter:
            self._best_checking()

    def after_train(self) -> None:
        """Nothing: the last evaluation belongs to the last iteration."""

    def _best_checking(self) -> None:
        latest = self.trainer.storage.latest().get(self._val_metric)
        if latest is None or (self.best_metric is not None and latest[0] <= self.best_metric):
            super()._best_checking()  # says why nothing is saved
            return
        before = self.state_dict()
        if not self._update_best(*latest):
            return
        # Detectron2 saves first and notes the new best afterwards: it would not be in the file.
        if self._checkpointer.save(self._file_prefix):
            logger.info("best %s so far: %.3f", self._val_metric, self.best_metric)
        else:  # the disk is full: what was the best still is, of what there is
            self.load_state_dict(before)

    def state_dict(self) -> dict:
        return {"best_metric": self.best_metric, "best_iter": self.best_iter}

    def load_state_dict(self, state: dict) -> None:
        self.best_metric, self.best_iter = state["best_metric"], state["best_iter"]


class PeriodicCheckpoint(PeriodicCheckpointer):
    """Detectron2's, but the last file is :class:`FinalCheckpoint`'s."""

    def before_train(self) -> None:
        """Nothing; Detectron2's learns here when training ends."""


class FinalCheckpoint(HookBase):
    """Saves the result of training.

    A hook of its own: a run that ended between its last periodic file and this one makes up for it.
    """

    def __init__(self, checkpointer: Checkpointer) -> None:
        self._checkpointer = checkpointer

    def after_step(self) -> None:
        if self.trainer.iter + 1 >= self.trainer.max_iter:
            self._checkpointer.save(FINAL, iteration=self.trainer.iter)


class NoPseudoLabelWarning(HookBase):
    """Warns once when unlabeled images teach nothing, and says how far they are from it."""

    def __init__(self, threshold: float, patience: int = 500) -> None:
        """
        Args:
            threshold: score that a detection must exceed to become a pseudo-label.
            patience: iterations of mutual learning in a row without one before the warning.
        """
        self._threshold = threshold
        self._patience = patience
        self._without = 0
        self._highest = 0.0
        self._done = False
        self._seen = -1  # iteration

    def before_train(self) -> None:
        self._seen = self.trainer.start_iter - 1

    def after_step(self) -> None:
        histories = self.trainer.storage.histories()
        if self._done or "pseudo_labels/per_image" not in histories:  # burn-in measures nothing
            return
        # They come late, those of many iterations at a time.
        newest_first = zip(
            reversed(histories["pseudo_labels/per_image"].values()),
            reversed(histories[HIGHEST_SCORE].values()),
            strict=True,
        )
        new = list(takewhile(lambda measured: measured[0][1] > self._seen, newest_first))
        for (found, iteration), (highest, _) in reversed(new):
            self._seen = iteration
            if not self._done:
                self._watch(found, highest)

    def _watch(self, found: float, highest: float) -> None:
        if found > 0:
            self._without, self._highest = 0, 0.0
            return
        self._without += 1
        self._highest = max(self._highest, highest)
        if self._without >= self._patience:
            self._done = True
            logger.warning(
                "no detection of the teacher has become a pseudo-label in %d iterations, so "
                "unlabeled images teach no objects: the highest score was %.3f, "
                "SEMI.PSEUDO_LABEL_THRESHOLD is %.2f. Lower it, or give the teacher more to start "
                "from: a longer SEMI.BURN_IN_ITERS, pretrained MODEL.WEIGHTS, more labels",
                self._without,
                self._highest,
                self._threshold,
            )

    def state_dict(self) -> dict:
        return {"without": self._without, "highest": self._highest, "done": self._done}

    def load_state_dict(self, state: dict) -> None:
        self._without, self._highest = state["without"], state["highest"]
        self._done = state["done"]
