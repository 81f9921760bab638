"""What training would stop at before or in its first iterations, by the checks of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from detectron2.config import CfgNode

from ..checkpoint.checkpointer import check_weights_exist
from ..config import scale_to_world_size
from ..data.inspection.annotations import kept_warnings
from ..data.inspection.findings import Finding, Severity
from ..data.inspection.images import ImageFacts
from ..data.mapper import ViewMapper
from ..data.training_sets import TrainingSets, load_training_sets, register_datasets
from ..data.unreadable import UnreadableImageCounter, is_unreadable_share_tolerated
from ..errors import UsageError
from .effective_values import amp_dtype
from .training_step import StepSettings


def config_findings(cfg: CfgNode, num_gpus: int) -> list[Finding]:
    """Of the settings, whatever the data are. Weights of a zoo are fetched, as training would."""
    checks: list[Callable[[], object]] = [
        partial(scale_to_world_size, cfg, num_gpus),
        partial(check_weights_exist, cfg.MODEL.WEIGHTS),
        partial(StepSettings.from_config, cfg),
        partial(amp_dtype, cfg),
        partial(ViewMapper, cfg),
        partial(UnreadableImageCounter, cfg.DATASETS.CHECKS.MAX_UNREADABLE_SHARE),
    ]
    return [finding for check in checks for finding in _refusals(check)]


def read_for_training(cfg: CfgNode) -> tuple[TrainingSets | None, list[Finding]]:
    """The images as training will split and exclude them, or why it would stop."""
    cfg = cfg.clone()
    cfg.DATASETS.CHECKS.DECODE_IMAGES = False  # all were read already
    sets: list[TrainingSets] = []

    def read() -> None:
        register_datasets(cfg)
        sets.append(load_training_sets(cfg))

    with kept_warnings():
        findings = _refusals(read)
    return (sets[0] if sets else None), findings


def unreadable_findings(
    cfg: CfgNode, sets: TrainingSets, facts: dict[str, ImageFacts]
) -> list[Finding]:
    """Whether more of the unlabeled images are unreadable than training tolerates."""
    files = [record["file_name"] for record in sets.unlabeled]
    faulty = [file for file in files if facts[file].fault]
    if not faulty:
        return []
    iterations = max(0, cfg.SOLVER.MAX_ITER - cfg.SEMI.BURN_IN_ITERS)
    drawn = iterations * cfg.SOLVER.IMS_PER_BATCH_UNLABELED
    limit = cfg.DATASETS.CHECKS.MAX_UNREADABLE_SHARE
    if is_unreadable_share_tolerated(len(faulty), drawn * len(faulty) / len(files), drawn, limit):
        return []
    text = (
        f"{len(faulty)} of {len(files)} unlabeled images cannot be read, which is more than "
        f"DATASETS.CHECKS.MAX_UNREADABLE_SHARE {limit:g}: training would stop. Repair or remove them, or "
        "raise that share"
    )
    return [Finding(Severity.ERROR, text, faulty)]


def _refusals(check: Callable[[], object]) -> list[Finding]:
    try:
        check()
    except UsageError as error:
        return [Finding(Severity.ERROR, str(error))]
    return []
