"""Checks that run before training starts, in the trainer and in ``tools/check_data.py``."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import distributed

from ..checkpoint.loading import check_weights_exist
from ..checkpoint.timm_weights import load_pretrained, starts_from_timm_weights
from ..config_scaling import scale_to_world_size
from ..data.datasets.shards import ShardedImages
from ..data.inspection.annotations import collected_warnings
from ..data.inspection.findings import Finding, Severity
from ..data.inspection.images import ImageFacts
from ..data.mapper import ViewMapper
from ..data.training_sets import TrainingSets, load_training_sets, register_datasets
from ..data.unreadable import UnreadableImageCounter, is_unreadable_share_tolerated
from ..ema import highest_keep_rate, keep_rate
from ..errors import UsageError
from ..modeling import build_detector
from ..modeling.backbones import uses_timm
from .console import CONSOLE
from .evaluation import count_test_images
from .optimizer import amp_dtype
from .training_step import StepSettings

logger = logging.getLogger(__name__)

_MAX_NAMED_CLASSES = 8  # more are counted only
# A burn-in of this many times SOLVER.MAX_ITER is meant to last, as in methods/supervised.yaml.
_ENDLESS_BURN_IN = 100


def check_device(
    device: str, remedy: str = "add MODEL.DEVICE cpu SOLVER.AMP.ENABLED False"
) -> None:
    """Check that the processes of this run can use a device.

    Args:
        device: ``MODEL.DEVICE``.
        remedy: what to do where there is no GPU, for the message.

    Raises:
        UsageError: if they cannot; says what to set instead.
    """
    try:
        parsed = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"there is no device {device!r}: use cuda or cpu") from error
    is_gpu = parsed.type == "cuda"
    if is_gpu and not torch.cuda.is_available():
        raise UsageError(f"there is no GPU here: {remedy}")
    if is_gpu and (parsed.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"there is no GPU {device}: this machine has {torch.cuda.device_count()}, the first is "
            "cuda:0"
        )
    if comm.get_world_size() == 1:
        return
    if is_gpu and device != "cuda":
        raise UsageError(
            f"MODEL.DEVICE {device} would put all processes on one GPU; with MODEL.DEVICE cuda "
            "each process has its own"
        )
    if not is_gpu and distributed.get_backend() == "nccl":
        raise UsageError(
            f"MODEL.DEVICE is {device}, but several processes on a machine with GPUs exchange "
            "gradients through these: set MODEL.DEVICE cuda, or hide the GPUs with "
            "CUDA_VISIBLE_DEVICES=''"
        )


def log_effective_values(cfg: CfgNode, sets: TrainingSets) -> None:
    """Log data, batch size, learning rate, iterations and epochs, and warn of likely mistakes.

    Args:
        cfg: scaled to the number of GPUs.
        sets: the training images.
    """
    names = sets.class_names
    CONSOLE.info(
        "data: %d labeled, %d unlabeled and %d test images; %d classes%s",
        len(sets.labeled),
        len(sets.unlabeled),
        count_test_images(cfg),
        len(names),
        f" ({', '.join(names)})" if len(names) <= _MAX_NAMED_CLASSES else "",
    )
    world_size = comm.get_world_size()
    labeled, unlabeled = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.IMS_PER_BATCH_UNLABELED
    mutual = max(0, cfg.SOLVER.MAX_ITER - cfg.SEMI.BURN_IN_ITERS)
    epochs = mutual * unlabeled / len(sets.unlabeled) if sets.unlabeled else 0.0
    logger.info(
        "Effective values on %d process(es): %d labeled + %d unlabeled images per iteration "
        "(%d + %d per process), learning rate %g, %d iterations of which %d burn-in; "
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
        if text := unused_unlabeled_images(cfg):
            logger.warning(text)
        else:
            CONSOLE.info("unlabeled images are not used")
    if fixes := untrained_random_layers(cfg):
        logger.warning(
            "MODEL.WEIGHTS is empty, and a part of the backbone keeps its random weights because "
            "it is frozen; set %s. configs/bccd-small.yaml shows further settings for training "
            "from random weights",
            " ".join(word for pair in fixes.items() for word in pair),
        )


def unused_unlabeled_images(cfg: CfgNode) -> str:
    """Say that burn-in never ends; empty if it does, or if it is meant to last."""
    burn_in, iterations = cfg.SEMI.BURN_IN_ITERS, cfg.SOLVER.MAX_ITER
    if not iterations <= burn_in < _ENDLESS_BURN_IN * iterations:
        return ""
    return (
        f"unlabeled images are not used: SEMI.BURN_IN_ITERS {burn_in} is not below SOLVER.MAX_ITER "
        f"{iterations}. Lower it, or use --method supervised if this is intended"
    )


def schedule_findings(cfg: CfgNode) -> list[Finding]:
    """Find settings that do not fit the number of iterations.

    Args:
        cfg: not scaled to the number of GPUs, which changes iterations, warmup, burn-in and keep
            rate alike.
    """
    texts = []
    rate, iterations = cfg.SEMI.EMA_KEEP_RATE, cfg.SOLVER.MAX_ITER
    if cfg.SOLVER.WARMUP_ITERS >= iterations:
        texts.append(
            f"SOLVER.WARMUP_ITERS {cfg.SOLVER.WARMUP_ITERS} is not below SOLVER.MAX_ITER "
            f"{iterations}: the learning rate never reaches SOLVER.BASE_LR. Lower it"
        )
    if cfg.DATASETS.UNLABELED or cfg.DATASETS.LABELED_PERCENT < 100:
        texts.append(unused_unlabeled_images(cfg))
    mutual = iterations - cfg.SEMI.BURN_IN_ITERS
    is_too_high = rate > highest_keep_rate(mutual)
    if mutual > 0 and is_too_high and keep_rate(mutual, rate) < rate:
        texts.append(
            f"SEMI.EMA_KEEP_RATE {rate:g} is too high for {mutual} iterations after burn-in: it is "
            "never reached, and the teacher is the mean of all students since burn-in. Set it to "
            f"at most {highest_keep_rate(mutual):g}"
        )
    return [Finding(Severity.WARNING, text) for text in texts if text]


def untrained_random_layers(cfg: CfgNode) -> dict[str, str]:
    """Find frozen layers of a randomly initialized backbone.

    By default Detectron2 freezes the first stages and batch norm, which suits pretrained weights.

    Returns:
        config keys to set and their values; empty if all layers are trained or pretrained.
    """
    if cfg.MODEL.WEIGHTS or starts_from_timm_weights(cfg):
        return {}
    fixes = {}
    if cfg.MODEL.BACKBONE.FREEZE_AT > 0:
        fixes["MODEL.BACKBONE.FREEZE_AT"] = "0"
    section = "TIMM" if uses_timm(cfg) else "RESNETS"
    if cfg.MODEL[section].NORM == "FrozenBN":
        fixes[f"MODEL.{section}.NORM"] = "BN"
    return fixes


def config_findings(cfg: CfgNode, num_gpus: int) -> list[Finding]:
    """Run the checks of the config that training runs, and return their errors.

    Weights of a model zoo are downloaded, as in training.
    """
    checks: list[Callable[[], object]] = [
        partial(scale_to_world_size, cfg, num_gpus),
        partial(check_weights_exist, cfg.MODEL.WEIGHTS),
        partial(_build_and_load_on_cpu, cfg),
        partial(StepSettings.from_config, cfg),
        partial(amp_dtype, cfg),
        partial(ViewMapper, cfg),
        partial(UnreadableImageCounter, cfg.DATASETS.CHECKS.MAX_UNREADABLE_SHARE),
    ]
    return [finding for check in checks for finding in _errors_of(check)]


def _build_and_load_on_cpu(cfg: CfgNode) -> None:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    load_pretrained(cfg, build_detector(cfg))


def read_for_training(cfg: CfgNode) -> tuple[TrainingSets | None, list[Finding]]:
    """Load the training sets as training does.

    Returns:
        the training sets, None if they cannot be loaded; and the errors.
    """
    cfg = cfg.clone()
    cfg.DATASETS.CHECKS.DECODE_IMAGES = False  # the caller has decoded them
    sets: list[TrainingSets] = []

    def read() -> None:
        register_datasets(cfg)
        sets.append(load_training_sets(cfg))

    with collected_warnings():
        findings = _errors_of(read)
    return (sets[0] if sets else None), findings


def unreadable_findings(
    cfg: CfgNode, sets: TrainingSets, facts: dict[str, ImageFacts]
) -> list[Finding]:
    """Check whether training would stop because too many unlabeled images are unreadable."""
    if isinstance(sets.unlabeled, ShardedImages):  # too many to read all
        return []
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
        f"DATASETS.CHECKS.MAX_UNREADABLE_SHARE {limit:g}: training would stop. Repair or remove "
        "the images, or raise the limit"
    )
    return [Finding(Severity.ERROR, text, faulty)]


def _errors_of(check: Callable[[], object]) -> list[Finding]:
    try:
        check()
    except UsageError as error:
        return [Finding(Severity.ERROR, str(error))]
    return []


def check_burn_in(*, previous: int, current: int, done: int) -> None:
    """Reject a burn-in that would start again when resuming, and overwrite the teacher.

    Args:
        previous: ``SEMI.BURN_IN_ITERS`` of the stopped run.
        current: ``SEMI.BURN_IN_ITERS`` of the resumed run.
        done: iterations that the stopped run has done.

    Raises:
        UsageError: says what to set it to.
    """
    if previous < done < current:
        raise UsageError(
            f"SEMI.BURN_IN_ITERS {current} would undo what the teacher has learned: burn-in ended "
            f"after {previous} of the {done} iterations done; set it to {previous}, or start a new "
            "run"
        )
