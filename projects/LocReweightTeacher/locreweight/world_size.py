"""One config for any number of GPUs."""

from __future__ import annotations

import math

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer

from .errors import UsageError


def scale_to_world_size(cfg: CfgNode, world_size: int) -> CfgNode:
    """The config for this number of GPUs, by Detectron2's own rule and two that go with it.

    With ``SOLVER.REFERENCE_WORLD_SIZE`` set, images per GPU stay the same: batch and learning rate
    grow with the number of GPUs, everything counted in iterations shrinks by it, and the teacher
    forgets as much after the same number of images: the keep rate is raised to the power of the
    scale (Busbridge et al., How to Scale Your EMA, 2023). With 0 the config holds as written,
    whatever the number of GPUs.

    Raises:
        UsageError: if a batch cannot be shared equally among the GPUs, or the keep rate, of which
            no power could be taken, is no share.
    """
    if not 0.0 <= cfg.SEMI.EMA_KEEP_RATE <= 1.0:
        raise UsageError(
            f"SEMI.EMA_KEEP_RATE is {cfg.SEMI.EMA_KEEP_RATE:g}; it is the share of itself that the "
            "teacher keeps in an update, from 0 to 1"
        )
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    for size in (reference, world_size) if reference else (world_size,):
        for key in ("IMS_PER_BATCH", "IMS_PER_BATCH_UNLABELED"):
            images = cfg.SOLVER[key]
            # On the way to another number of GPUs only the reference has to divide the batch.
            if images % size and (size == reference or not reference):
                raise UsageError(
                    f"SOLVER.{key} = {images} cannot be shared equally by {size} GPUs; make it a "
                    f"multiple of {size}, for example {max(size, round(images / size) * size)}"
                )
    scaled = DefaultTrainer.auto_scale_workers(cfg, world_size)
    if scaled is not cfg:
        scale = world_size / reference
        frozen = scaled.is_frozen()
        scaled.defrost()
        scaled.SOLVER.IMS_PER_BATCH_UNLABELED = round(cfg.SOLVER.IMS_PER_BATCH_UNLABELED * scale)
        scaled.SEMI.BURN_IN_ITERS = round(cfg.SEMI.BURN_IN_ITERS / scale)
        scaled.SEMI.EMA_KEEP_RATE = cfg.SEMI.EMA_KEEP_RATE**scale
        scaled.VIS_PERIOD = math.ceil(cfg.VIS_PERIOD / scale)  # 0 is never, and only 0
        if frozen:
            scaled.freeze()
    if scaled.SOLVER.IMS_PER_BATCH < 1:
        raise UsageError("SOLVER.IMS_PER_BATCH must be at least one labeled image per GPU")
    return scaled
