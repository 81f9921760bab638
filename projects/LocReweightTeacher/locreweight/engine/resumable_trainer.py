"""Training loop that can be stopped at any time and resumed with bit-for-bit equal results."""

from __future__ import annotations

import contextlib
import logging
from functools import partial

import numpy as np
from detectron2.engine import HookBase, TrainerBase
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from fvcore.common.history_buffer import HistoryBuffer

from .preemption import STOP_REQUEST

logger = logging.getLogger(__name__)

# Number of values of each metric in memory. Detectron2 keeps a million, which takes 0.5 GB in each
# process after 180,000 iterations. Hooks and writers use those of the last 20 iterations.
HISTORY_LENGTH = 1000


class EndOfTraining(BaseException):
    """Ends the training loop without an error, before ``max_iter``."""


class ResumableTrainer(TrainerBase):
    """Detectron2's training loop with hooks that are resumed by name.

    Hooks save the checkpoints. When a checkpoint of iteration ``i`` is written, some hooks have run
    in iteration ``i`` and others have not. The checkpoint therefore records for each named hook the
    last iteration in which it was started. A resumed run first runs the hooks that are behind, in
    their order. Classes and order of hooks may change between the two runs.

    Attributes:
        seed: seed of all random draws during training; the same in all processes.
        stop_agreed: whether any process was asked to stop; the same in all processes.
    """

    def __init__(self, seed: int, start_iter: int, max_iter: int) -> None:
        """
        Args:
            seed: see the attribute.
            start_iter: the first iteration.
            max_iter: the total number of iterations.
        """
        super().__init__()
        self.seed = seed
        self.start_iter, self.max_iter = start_iter, max_iter
        self.stop_agreed = False
        self._named_hooks: dict[str, HookBase] = {}
        self._finished: dict[str, int] = {}  # name -> last iteration in which the hook was started

    def register_named_hooks(self, named_hooks: dict[str, HookBase]) -> None:
        """Register hooks whose state and progress are saved in checkpoints under their names.

        Nothing is saved of hooks that are registered with ``register_hooks``.
        """
        self._named_hooks |= named_hooks
        self._finished |= dict.fromkeys(named_hooks, self.start_iter - 1)
        self.register_hooks(list(named_hooks.values()))

    def run_loop(self) -> None:
        """Train from ``start_iter`` to ``max_iter``. Signals to stop are only noted meanwhile."""
        with STOP_REQUEST.held(), contextlib.suppress(EndOfTraining):
            super().train(self.start_iter, self.max_iter)

    def ends_early(self, done: int) -> bool:
        """Whether training ends after ``done`` iterations, before ``max_iter``.

        It must be the same in all processes.
        """
        return False

    @property
    def is_last_iteration(self) -> bool:
        """Whether training ends with the current iteration."""
        return self.iter + 1 >= self.max_iter or self.ends_early(self.iter + 1)

    @property
    def is_finished(self) -> bool:
        """Whether all iterations and all their hooks were run."""
        return self.start_iter >= self.max_iter and not self._unfinished_hooks()

    def before_train(self) -> None:
        self.storage.histories().default_factory = partial(HistoryBuffer, HISTORY_LENGTH)
        super().before_train()
        unfinished = self._unfinished_hooks()
        if unfinished:
            self.iter = self.storage.iter = self.start_iter - 1
        for hook in unfinished:
            self._run_after_step(hook)
        if unfinished:
            self._end_if_due()

    def before_step(self) -> None:
        # Seed each iteration, so that random draws do not depend on hooks or on where the run was
        # resumed. Processes have different images and draw different numbers.
        key = (self.seed, comm.get_rank(), self.iter)
        seed_all_rng(int(np.random.SeedSequence(key).generate_state(1)[0]))
        super().before_step()

    def after_step(self) -> None:
        for hook in self._hooks:
            self._run_after_step(hook)
        self._end_if_due()

    def _end_if_due(self) -> None:
        if self.ends_early(self.iter + 1):
            raise EndOfTraining

    def _run_after_step(self, hook: HookBase) -> None:
        for name, named_hook in self._named_hooks.items():
            if named_hook is hook:
                # Before it runs: the hook itself may save the checkpoint.
                self._finished[name] = self.iter
        hook.after_step()

    def _unfinished_hooks(self) -> list[HookBase]:
        """The hooks that have not run in the last iteration before ``start_iter``."""
        last = self.start_iter - 1
        return [hook for name, hook in self._named_hooks.items() if self._finished[name] < last]

    def state_dict(self) -> dict:
        states = {name: hook.state_dict() for name, hook in self._named_hooks.items()}
        return {
            "iteration": self.iter,
            "seed": self.seed,
            "hooks": {name: state for name, state in states.items() if state},
            "finished": dict(self._finished),
        }

    def load_state_dict(self, state_dict: dict) -> None:
        self.iter = state_dict["iteration"]
        self.start_iter = self.iter + 1
        self.seed = state_dict["seed"]
        # A hook that the stopped run did not have has nothing to catch up on.
        finished = state_dict["finished"]
        self._finished = {name: finished.get(name, self.iter) for name in self._named_hooks}
        for name, state in state_dict["hooks"].items():
            if name in self._named_hooks:
                self._named_hooks[name].load_state_dict(state)
            else:
                logger.warning("the checkpoint has the state of a hook %r, which is unused", name)
