"""Scaling of a config to the number of GPUs."""

from __future__ import annotations

import math

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer

from .config_checks import check_schedule
from .errors import UsageError


def scale_to_world_size(cfg: CfgNode, world_size: int) -> CfgNode:
    """Scale a config to the number of GPUs.

    With ``SOLVER.REFERENCE_WORLD_SIZE`` set, the number of images per GPU stays the same. Batch
    size and learning rate grow with the number of GPUs, and everything that is counted in
    iterations shrinks, as in Detectron2. The EMA keep rate is raised to the power of the scale, so
    that the teacher averages over the same number of images (Busbridge et al., How to Scale Your
    EMA, 2023). With 0 the config is used as written.

    Args:
        cfg: not changed.
        world_size: number of GPUs (processes).

    Raises:
        UsageError: if a batch cannot be divided equally among the GPUs, or the keep rate is not
            between 0 and 1.
    """
    if not 0.0 <= cfg.SEMI.EMA_KEEP_RATE <= 1.0:
        raise UsageError(
            f"SEMI.EMA_KEEP_RATE is {cfg.SEMI.EMA_KEEP_RATE:g}; it must be from 0 to 1"
        )
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    for size in (reference, world_size) if reference else (world_size,):
        for key in ("IMS_PER_BATCH", "IMS_PER_BATCH_UNLABELED"):
            images = cfg.SOLVER[key]
            # With a reference, only the reference has to divide the batch.
            if images % size and (size == reference or not reference):
                raise UsageError(
                    f"SOLVER.{key} = {images} cannot be divided equally among {size} GPUs; use a "
                    f"multiple of {size}, for example {max(size, round(images / size) * size)}"
                )
    scaled = DefaultTrainer.auto_scale_workers(cfg, world_size)
    if scaled is not cfg:
        scale = world_size / reference
        frozen = scaled.is_frozen()
        scaled.defrost()
        scaled.SOLVER.IMS_PER_BATCH_UNLABELED = round(cfg.SOLVER.IMS_PER_BATCH_UNLABELED * scale)
        scaled.SOLVER.BASE_LR_END = cfg.SOLVER.BASE_LR_END * scale
        scaled.SEMI.BURN_IN_ITERS = round(cfg.SEMI.BURN_IN_ITERS / scale)
        scaled.SEMI.EMA_KEEP_RATE = cfg.SEMI.EMA_KEEP_RATE**scale
        # At least 1, because 0 means never.
        scaled.VIS_PERIOD = math.ceil(cfg.VIS_PERIOD / scale)
        if cfg.TEST.EVAL_PERIOD > 0:
            scaled.TEST.EVAL_PERIOD = max(1, scaled.TEST.EVAL_PERIOD)
        if cfg.SOLVER.CHECKPOINT_PERIOD > 0:
            scaled.SOLVER.CHECKPOINT_PERIOD = max(1, scaled.SOLVER.CHECKPOINT_PERIOD)
        if frozen:
            scaled.freeze()
    if scaled.SOLVER.IMS_PER_BATCH < 1:
        raise UsageError("SOLVER.IMS_PER_BATCH must be at least one labeled image per GPU")
    if scaled.SOLVER.MAX_ITER < 1:
        raise UsageError(
            f"SOLVER.MAX_ITER {cfg.SOLVER.MAX_ITER} is less than one iteration on {world_size} "
            f"GPUs, because it counts iterations on {reference or world_size} GPUs "
            "(SOLVER.REFERENCE_WORLD_SIZE): set it to at least "
            f"{max(1, math.ceil(world_size / (reference or world_size)))}"
        )
    check_schedule(scaled)
    return scaled
