"""Training that may be stopped at any moment and then goes on, bit for bit, as if it had not."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from detectron2.engine import HookBase, TrainerBase
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng

from .preemption import STOP_REQUEST

logger = logging.getLogger(__name__)


class ResumableTrainer(TrainerBase):
    """Detectron2's loop, which also finishes an iteration that was stopped between two hooks.

    Checkpoints are saved by hooks. The hooks after the one that saved it may or may not have run in
    the iteration that the checkpoint is of: a resumed run runs them first of all.

    Attributes:
        stop_agreed: whether any process was asked to stop; all of them know of it.
    """

    def __init__(self, seed: int, start_iter: int, max_iter: int) -> None:
        """
        Args:
            seed: of everything that is drawn in training; the same in all processes.
            start_iter, max_iter: the first iteration, and the number of all.
        """
        super().__init__()
        self.seed = seed
        self.start_iter, self.max_iter = start_iter, max_iter
        self.stop_agreed = False
        self._at_hook = ""  # the class of the one that is running, or saved the checkpoint
        self._lasting_hooks: list[HookBase] = []

    def register_lasting_hooks(self, hooks: list[HookBase]) -> None:
        """Hooks that a resumed run has again, of different classes and in this order."""
        self._lasting_hooks += hooks
        self.register_hooks(hooks)

    def run_loop(self) -> None:
        """From the first iteration to the last; the signals to stop are only noted meanwhile."""
        with STOP_REQUEST.held():
            super().train(self.start_iter, self.max_iter)

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing left to do, not even in the last iteration."""
        return self.start_iter >= self.max_iter and not self._unfinished_hooks()

    def before_train(self) -> None:
        super().before_train()
        unfinished = self._unfinished_hooks()
        if unfinished:
            self.iter = self.storage.iter = self.start_iter - 1
            self._run(unfinished)

    def before_step(self) -> None:
        """Nothing that was drawn before matters: not what a hook drew, and not a stop."""
        # Processes draw differently, as their images differ.
        key = (self.seed, comm.get_rank(), self.iter)
        seed_all_rng(int(np.random.SeedSequence(key).generate_state(1)[0]))
        super().before_step()

    def after_step(self) -> None:
        self._run(self._hooks)

    def _run(self, hooks: Sequence[HookBase]) -> None:
        for hook in hooks:
            self._at_hook = type(hook).__qualname__
            hook.after_step()

    def _unfinished_hooks(self) -> list[HookBase]:
        names = [type(hook).__qualname__ for hook in self._lasting_hooks]
        after = names.index(self._at_hook) + 1 if self._at_hook in names else len(names)
        return self._lasting_hooks[after:]

    def state_dict(self) -> dict:
        return super().state_dict() | {"at_hook": self._at_hook, "seed": self.seed}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._at_hook, self.seed = state_dict["at_hook"], state_dict["seed"]
        self.start_iter = self.iter + 1
