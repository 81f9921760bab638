"""Checks of a config: keys that have no effect, are out of range or contradict each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from operator import attrgetter

from detectron2.config import CfgNode

from .config import default_config
from .errors import UsageError
from .installed_detectron2 import check_compiled_kernels
from .modeling.backbones import uses_timm
from .modeling.building import check_anchors, find_other_class

# Keys of Detectron2 that have no effect here: in training and evaluation, and in training only.
_IGNORED = (
    "MODEL.LOAD_PROPOSALS",
    "DATASETS.PROPOSAL_FILES_TEST",
    "TEST.AUG.ENABLED",
    "TEST.EXPECTED_RESULTS",
)
_IGNORED_IN_TRAINING = (
    "MODEL.MASK_ON",
    "MODEL.KEYPOINT_ON",
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE",
    "MODEL.ROI_BOX_HEAD.USE_FED_LOSS",
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE",
    "INPUT.CROP.ENABLED",
    "DATASETS.PROPOSAL_FILES_TRAIN",
    "DATALOADER.SAMPLER_TRAIN",
    "DATALOADER.REPEAT_THRESHOLD",
    "TEST.PRECISE_BN.ENABLED",
)
_Range = tuple[str, Callable[[float], bool]]
_AT_LEAST_0: _Range = ("at least 0", lambda x: 0 <= x < math.inf)
_ABOVE_0: _Range = ("above 0", lambda x: 0 < x < math.inf)
_RANGES: dict[str, _Range] = {
    "SEMI.BURN_IN_ITERS": _AT_LEAST_0,
    "SEMI.PSEUDO_LABEL_THRESHOLD": ("at least 0 and below 1", lambda x: 0 <= x < 1),
    "SEMI.UNSUPERVISED_WEIGHT": _AT_LEAST_0,
    "SEMI.QUALITY_SCALE": _ABOVE_0,
    "SOLVER.BASE_LR": _ABOVE_0,
    "SOLVER.IMS_PER_BATCH_UNLABELED": _AT_LEAST_0,
    "SOLVER.EARLY_STOPPING_PATIENCE": _AT_LEAST_0,
    "TEST.MONITORED_IMAGES": _AT_LEAST_0,
}
_RANGES_AT_INFERENCE: dict[str, _Range] = {"MODEL.ROI_BOX_HEAD.VOTING_SIGMA": _AT_LEAST_0}


def check_supported(cfg: CfgNode, *, training: bool = True) -> None:
    """Check for keys that have no effect here, are out of range or contradict each other.

    Args:
        cfg: the config.
        training: also check the keys that evaluation does not read.

    Raises:
        UsageError: names the first such key and says what to set it to.
    """
    if training:
        check_compiled_kernels(cfg)
        check_anchors(cfg)
        if not cfg.OUTPUT_DIR:
            raise UsageError("OUTPUT_DIR is empty; set it to a folder for checkpoints and logs")
        _check_model(cfg)
        _check_timm(cfg)
        _check_ranges(cfg, _RANGES)
        _check_input(cfg)
        _check_early_stopping(cfg)
    _check_ranges(cfg, _RANGES_AT_INFERENCE)
    _check_ignored(cfg, _IGNORED + (_IGNORED_IN_TRAINING if training else ()))
    _check_datasets(cfg, ("TRAIN", "UNLABELED", "TEST") if training else ("TEST",))


def _check_model(cfg: CfgNode) -> None:
    """Check that the detector can be trained on unlabeled images."""
    if other := find_other_class(cfg):
        key, name, needed = other
        raise UsageError(f"{key} {name} cannot be trained on unlabeled images: set it to {needed}")


def _check_timm(cfg: CfgNode) -> None:
    timm = cfg.MODEL.TIMM
    if uses_timm(cfg):
        if cfg.MODEL.WEIGHTS.startswith("detectron2://ImageNetPretrained/"):
            raise UsageError(
                f"MODEL.WEIGHTS {cfg.MODEL.WEIGHTS} holds a ResNet of Detectron2, but the backbone "
                f"is MODEL.TIMM.NAME {timm.NAME}: set MODEL.WEIGHTS '', and MODEL.TIMM.PRETRAINED "
                "to its weights"
            )
        return
    default = default_config().MODEL.TIMM
    if changed := [key for key in timm if timm[key] != default[key]]:
        values = ", ".join(f"MODEL.TIMM.{key} is {timm[key]}" for key in changed)
        defaults = " ".join(f"MODEL.TIMM.{key} {default[key]!r}" for key in changed)
        raise UsageError(
            f"{values}, but MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME} does not use MODEL.TIMM: "
            "set MODEL.BACKBONE.NAME build_timm_fpn_backbone and MODEL.TIMM.NAME "
            f"(docs/pretrained_backbones.md), or {defaults}"
        )


def _check_ranges(cfg: CfgNode, ranges: dict[str, _Range]) -> None:
    for key, (text, contains) in ranges.items():
        value = attrgetter(key)(cfg)
        if not contains(value):
            raise UsageError(f"{key} is {value}; it must be {text}")


def _check_early_stopping(cfg: CfgNode) -> None:
    if cfg.SOLVER.EARLY_STOPPING_PATIENCE and not (cfg.DATASETS.TEST and cfg.TEST.EVAL_PERIOD > 0):
        raise UsageError(
            "SOLVER.EARLY_STOPPING_PATIENCE counts evaluations, and there are none during training:"
            " set DATASETS.TEST and TEST.EVAL_PERIOD"
        )


def _check_input(cfg: CfgNode) -> None:
    _check_choice(cfg, "INPUT.RANDOM_FLIP", ("none", "horizontal", "vertical"))
    _check_choice(cfg, "INPUT.MIN_SIZE_TRAIN_SAMPLING", ("range", "choice"))
    sizes = cfg.INPUT.MIN_SIZE_TRAIN
    if not sizes:
        raise UsageError("INPUT.MIN_SIZE_TRAIN is empty; set it to the short side of the images")
    is_range = cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range"
    if is_range and (len(sizes) != 2 or sizes[0] > sizes[1]):
        raise UsageError(
            f"INPUT.MIN_SIZE_TRAIN {tuple(sizes)} must be a smallest and a largest size, because "
            "INPUT.MIN_SIZE_TRAIN_SAMPLING is range: for a single size, give it twice; for a list "
            "of sizes, set the sampling to choice"
        )


def _check_ignored(cfg: CfgNode, keys: Sequence[str]) -> None:
    default = default_config()
    for key in keys:
        value = attrgetter(key)(default)
        if attrgetter(key)(cfg) != value:
            raise UsageError(
                f"{key} is not supported here; leave it at Detectron2's default, {value!r}"
            )


def _check_datasets(cfg: CfgNode, keys: Sequence[str]) -> None:
    for key in keys:
        names = cfg.DATASETS[key]
        for name in names:
            if names.count(name) > 1:
                raise UsageError(f"DATASETS.{key} contains {name!r} more than once: name it once")
    for name in cfg.DATASETS.CLASS_NAMES:
        if not isinstance(name, str):
            raise UsageError(
                f"DATASETS.CLASS_NAMES contains {name!r}: use a text in quotes, such as "
                f"{str(name)!r}, because yaml reads words like yes and no, and digits, as other "
                "values"
            )


def _check_choice(cfg: CfgNode, key: str, known: Sequence[str]) -> None:
    value = attrgetter(key)(cfg)
    if value not in known:
        raise UsageError(f"unknown {key} {value!r}; known names: {', '.join(known)}")


def check_schedule(cfg: CfgNode) -> None:
    """Check the keys of the optimizer and of the learning rate schedule."""
    solver = cfg.SOLVER
    for key, known in {
        "LR_SCHEDULER_NAME": (
            "WarmupMultiStepLR",
            "WarmupCosineLR",
            "WarmupStepWithFixedGammaLR",
        ),
        "WARMUP_METHOD": ("linear", "constant"),
        "OPTIMIZER": ("SGD", "AdamW"),
    }.items():
        _check_choice(cfg, f"SOLVER.{key}", known)
    if solver.CLIP_GRADIENTS.ENABLED:
        _check_choice(cfg, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", ("norm", "value"))
    # Later steps have no effect, so that a short trial run does not need other steps.
    reached = [step for step in solver.STEPS if step <= solver.MAX_ITER]
    is_multi_step = solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR"
    if is_multi_step and (
        any(first >= second for first, second in pairwise([0, *solver.STEPS]))
        or solver.MAX_ITER in reached
    ):
        raise UsageError(
            f"SOLVER.STEPS {tuple(solver.STEPS)} must be positive, in increasing order, and not "
            f"SOLVER.MAX_ITER {solver.MAX_ITER} itself: the learning rate changes after these "
            "iterations"
        )
    is_cosine = solver.LR_SCHEDULER_NAME == "WarmupCosineLR"
    if is_cosine and not 0.0 <= solver.BASE_LR_END <= solver.BASE_LR:
        raise UsageError(
            f"SOLVER.BASE_LR_END {solver.BASE_LR_END:g} must be from 0 to SOLVER.BASE_LR "
            f"{solver.BASE_LR:g}"
        )
