"""Train the burn-in that several runs of a comparison have in common only once.

Methods that differ only in how they use pseudo-labels have the same burn-in: the first of them is
trained from the start, the others continue from its checkpoint at the end of burn-in. Random draws
depend on seed and iteration only, so the weights are the same, bit for bit, as without sharing.
Metrics and pictures of pseudo-labels during burn-in are those of the first run, also if another has
another threshold; pictures and evaluation analyses are only in the folder of the first run.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Collection, Sequence
from pathlib import Path

import yaml

from ..checkpoint.files import DamagedCheckpoint, iteration_of
from ..errors import UsageError
from ..file_io import atomic_write_bytes
from ..methods import build_method
from ..run_files import BEST_CHECKPOINT, LAST_CHECKPOINT, METRICS_FILE
from .run_folder import flatten_config
from .run_queue import Run

logger = logging.getLogger(__name__)

# Other keys of SEMI have no effect on the weights during burn-in, only on measured pseudo-labels.
_USED_IN_BURN_IN = {"SEMI.NORMALIZE_BY_SAMPLED"}


class SharedBurnIn:
    """Decides which runs share a burn-in, and copies its checkpoint."""

    def __init__(self, runs: Sequence[Run], folder: Path) -> None:
        """
        Args:
            runs: all runs of a comparison.
            folder: where checkpoints at the end of burn-in are kept. A run may delete its own.

        Raises:
            UsageError: if a run that others depend on saves no checkpoint at the end of burn-in.
        """
        self._lock = threading.Lock()  # the slots of a queue are threads
        groups: dict[str, list[Run]] = {}
        for run in runs:
            if run.cfg.SEMI.BURN_IN_ITERS > 0:
                groups.setdefault(_settings_of_burn_in(run), []).append(run)
        self._source: dict[Run, Run] = {}  # run -> the run that trains its burn-in
        self._kept: dict[Run, Path] = {}  # run that trains a burn-in -> folder with its checkpoint
        for settings, group in groups.items():
            # A longer burn-in, such as that of a supervised run, begins like a shorter one.
            first = min(group, key=lambda run: run.cfg.SEMI.BURN_IN_ITERS)
            others = [run for run in group if run is not first]
            if others and first.cfg.SEMI.BURN_IN_ITERS < first.cfg.SOLVER.MAX_ITER:
                _check_saves_burn_in(first)
                self._source |= dict.fromkeys(others, first)
                # With other settings, the folder of an earlier comparison is not used.
                whole = f"{settings}{first.cfg.SEMI.BURN_IN_ITERS}"
                digest = hashlib.sha256(whole.encode()).hexdigest()[:12]
                name = f"{first.output.parent.name}-{first.output.name}-{digest}"
                self._kept[first] = folder / name

    def order(self, runs: Sequence[Run]) -> list[Run]:
        """Return the runs with those first that others depend on."""
        return sorted(runs, key=lambda run: run in self._source)

    @property
    def num_shared(self) -> int:
        """Number of runs that do not train their own burn-in."""
        return len(self._source)

    def keep_checkpoints(self) -> None:
        """Keep the checkpoints that others depend on, as soon as they exist."""
        with self._lock:
            for run, kept in self._kept.items():
                burn_in = run.cfg.SEMI.BURN_IN_ITERS
                if not kept.exists() and checkpoint_of_burn_in(run.output, burn_in).is_file():
                    partial = kept.with_name(f"{kept.name}.partial")
                    shutil.rmtree(partial, ignore_errors=True)
                    start_from_burn_in(partial, run.output, burn_in)
                    partial.rename(kept)

    def must_wait(self, run: Run, active: Collection[Run]) -> bool:
        """Whether a run has to wait for a burn-in that one of the active runs is training."""
        source = self._source.get(run)
        if source is None or source not in active or run.folder.has_checkpoint:
            return False
        self.keep_checkpoints()
        return not self._kept[source].exists()

    def prepare(self, run: Run) -> None:
        """Put the shared checkpoint into the folder of a run that has not started yet.

        Without such a checkpoint, the run trains its own burn-in.
        """
        source = self._source.get(run)
        if source is None or run.folder.has_checkpoint:
            return
        self.keep_checkpoints()
        kept = self._kept[source]
        if not kept.exists():
            logger.warning("%s trains its own burn-in: %s does not exist", run.name, kept)
            return
        burn_in = source.cfg.SEMI.BURN_IN_ITERS
        start_from_burn_in(run.output, kept, burn_in)
        # Metrics of the last iterations of burn-in may have been written after its checkpoint.
        if source.iterations_done >= burn_in:
            _copy_metrics(source.output, run.output)


def start_from_burn_in(output: Path, source: Path, burn_in: int) -> None:
    """Let a new run continue from the end of another run's burn-in.

    Args:
        output: ``OUTPUT_DIR`` of the new run, which is then resumed; created if missing.
        source: ``OUTPUT_DIR`` of the other run, with its checkpoint at the end of burn-in.
        burn_in: number of iterations of burn-in.
    """
    checkpoint = checkpoint_of_burn_in(source, burn_in)
    output.mkdir(parents=True, exist_ok=True)
    _link_or_copy(checkpoint, output / checkpoint.name)
    # If the method does not improve on burn-in, its best checkpoint is the one of burn-in.
    best = source / BEST_CHECKPOINT
    if _is_of_burn_in(best, burn_in):
        _link_or_copy(best, output / BEST_CHECKPOINT)
    _copy_metrics(source, output)
    atomic_write_bytes(output / LAST_CHECKPOINT, checkpoint.name.encode())


def checkpoint_of_burn_in(output: Path, burn_in: int) -> Path:
    """Path of the checkpoint at the end of burn-in."""
    return output / f"model_{burn_in - 1:07d}.pth"


def _is_of_burn_in(checkpoint: Path, burn_in: int) -> bool:
    if not checkpoint.is_file():
        return False
    try:
        return iteration_of(checkpoint, ["trainer"]) < burn_in
    except DamagedCheckpoint:
        return False


def _copy_metrics(source: Path, output: Path) -> None:
    """Copy ``metrics.json``, if it exists. Resuming removes lines of later iterations."""
    if (source / METRICS_FILE).is_file():
        shutil.copyfile(source / METRICS_FILE, output / METRICS_FILE)


def _link_or_copy(source: Path, target: Path) -> None:
    """Link a checkpoint, which is never changed after it was written, or copy it."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # the disk has no hard links, or the target is on another one
        shutil.copyfile(source, target)


def _settings_of_burn_in(run: Run) -> str:
    """All settings that have an effect before the end of burn-in, as text."""
    settings = flatten_config(yaml.safe_load(run.cfg.dump()))
    used = {
        key: value
        for key, value in settings.items()
        if key != "OUTPUT_DIR" and (not key.startswith("SEMI.") or key in _USED_IN_BURN_IN)
    }
    # A frozen pseudo-labeler is a further part of the checkpoint.
    method = build_method(run.cfg)
    used["frozen_pseudo_labeler"] = method.frozen_pseudo_labeler
    if method.num_members > 1:  # the method prepares them, so all its settings can have an effect
        used |= {key: value for key, value in settings.items() if key.startswith("SEMI.")}
    return yaml.safe_dump(used) + str(run.num_gpus)


def _check_saves_burn_in(run: Run) -> None:
    burn_in, period = run.cfg.SEMI.BURN_IN_ITERS, run.cfg.SOLVER.CHECKPOINT_PERIOD
    if period <= 0 or burn_in % period:
        raise UsageError(
            f"{run.name}: to share the burn-in of {burn_in} iterations, a checkpoint must be saved "
            f"at its end, but SOLVER.CHECKPOINT_PERIOD is {period}: set it to {burn_in} or a "
            "divisor of it"
        )
