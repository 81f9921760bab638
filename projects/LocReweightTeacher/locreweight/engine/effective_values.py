"""What the config comes to on this number of GPUs and with these data sets."""

from __future__ import annotations

import logging

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm

from ..data.training_sets import TrainingSets
from ..errors import UsageError

logger = logging.getLogger(__name__)


def log_effective_values(cfg: CfgNode, sets: TrainingSets) -> None:
    """One line of the log: images an iteration, learning rate, iterations and epochs."""
    world_size = comm.get_world_size()
    labeled, unlabeled = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.IMS_PER_BATCH_UNLABELED
    mutual = max(0, cfg.SOLVER.MAX_ITER - cfg.SEMI.BURN_IN_ITERS)
    epochs = mutual * unlabeled / len(sets.unlabeled) if sets.unlabeled else 0.0
    logger.info(
        "Effective values on %d process(es): %d labeled + %d unlabeled images an iteration "
        "(%d + %d each), learning rate %g, %d iterations of which %d burn-in; "
        "%.1f epochs of %d labeled and %.1f epochs of %d unlabeled images",
        world_size,
        labeled,
        unlabeled,
        labeled // world_size,
        unlabeled // world_size,
        cfg.SOLVER.BASE_LR,
        cfg.SOLVER.MAX_ITER,
        min(cfg.SEMI.BURN_IN_ITERS, cfg.SOLVER.MAX_ITER),
        cfg.SOLVER.MAX_ITER * labeled / len(sets.labeled),
        len(sets.labeled),
        epochs,
        len(sets.unlabeled),
    )
    if sets.unlabeled and not mutual:
        logger.warning("unlabeled images are not used: SEMI.BURN_IN_ITERS reaches SOLVER.MAX_ITER")
    if keys := untrained_random_layers(cfg):
        logger.warning(
            "MODEL.WEIGHTS is empty, and part of the backbone stays at random for good; set %s, "
            "and see configs/bccd-small.yaml for what else helps",
            " ".join(word for pair in keys.items() for word in pair),
        )


def untrained_random_layers(cfg: CfgNode) -> dict[str, str]:
    """Keys to set, with their values, where a backbone that starts at random would not be trained.

    Detectron2 freezes its first stages and its norms, which is meant for pretrained weights.
    """
    if cfg.MODEL.WEIGHTS:
        return {}
    keys = {}
    if cfg.MODEL.BACKBONE.FREEZE_AT > 0:
        keys["MODEL.BACKBONE.FREEZE_AT"] = "0"
    if cfg.MODEL.RESNETS.NORM == "FrozenBN":
        keys["MODEL.RESNETS.NORM"] = "BN"
    return keys


def amp_dtype(cfg: CfgNode) -> torch.dtype:
    """What ``SOLVER.AMP.DTYPE`` names.

    Raises:
        UsageError: for any other name.
    """
    known = {"float16": torch.float16, "bfloat16": torch.bfloat16}
    if cfg.SOLVER.AMP.DTYPE not in known:
        raise UsageError(f"SOLVER.AMP.DTYPE is {cfg.SOLVER.AMP.DTYPE!r}; choose of {list(known)}")
    return known[cfg.SOLVER.AMP.DTYPE]


def check_burn_in(cfg: CfgNode, *, before: int, done: int) -> None:
    """Once over, burn-in does not begin again: it would copy the student over the teacher.

    Args:
        cfg: the effective config of the run that goes on.
        before: ``SEMI.BURN_IN_ITERS`` of the run that stopped.
        done: iterations that it did.

    Raises:
        UsageError: says what to set it to.
    """
    now = cfg.SEMI.BURN_IN_ITERS
    if before < done < now:
        raise UsageError(
            f"SEMI.BURN_IN_ITERS {now} would undo what the teacher has learned: burn-in ended "
            f"after {before} of the {done} iterations done; set it back, or begin a new run"
        )
