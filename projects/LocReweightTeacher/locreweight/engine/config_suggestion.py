"""A complete config for the user's data, for ``tools/check_data.py --write-config``."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode

from ..checkpoint.loading import check_weights_exist
from ..checkpoint.timm_weights import find_pretrained, starts_from_timm_weights
from ..config import CONFIGS_FOLDER, load_config
from ..config_scaling import scale_to_world_size
from ..data.training_sets import TrainingSets
from ..ema import highest_keep_rate
from ..errors import UsageError
from ..file_io import atomic_write_bytes
from .run_folder import flatten_config

CPU_BASE = "detectors/cpu-mobilenetv2.yaml"
GPU_BASE = "detectors/gpu-resnet50.yaml"
EIGHT_GPUS_BASE = "detectors/eight-gpus-convnext-small.yaml"
# For machines that cannot download their weights. The last one starts from random weights.
CPU_FALLBACKS: tuple[str, ...] = ("bccd-small.yaml",)
GPU_FALLBACKS = ("detectors/gpu-resnet50-detectron2.yaml", "detectors/gpu-random-weights.yaml")

# Epochs of the labeled images in burn-in and of the unlabeled images after it, and the limits of
# the numbers of iterations that follow. The upper ones are the paper's for COCO.
BURN_IN_EPOCHS, MIN_BURN_IN, MAX_BURN_IN = 50, 300, 2000
UNLABELED_EPOCHS, MIN_MUTUAL, MAX_MUTUAL = 30, 600, 178_000
EVALUATIONS = 10
# Up to this number of iterations, the learning rate stays constant. In trainings of 700 iterations,
# lower rates at the end cost the teacher 1 to 2 AP (docs/ablations.md).
MAX_ITER_WITHOUT_STEPS = 10_000


def write_config(
    file: Path,
    cfg: CfgNode,
    sets: TrainingSets,
    keys: Sequence[str] = (),
    *,
    method: str = "",
    num_gpus: int = 1,
) -> tuple[CfgNode, str]:
    """Write a config with data, classes, a detector that fits the machine, and a schedule.

    Args:
        file: file to write; must not exist.
        cfg: config that names the data sets.
        sets: the data sets as training will use them.
        keys: further keys that the file takes from ``cfg``, because the user has set them. The
            schedule follows from them.
        method: name or file of the method that will be trained.
        num_gpus: number of GPUs that training will use.

    Returns:
        the written config with that of the method, as training loads them; and, if it does not
        start from the usual weights, from which it starts and why.

    Raises:
        UsageError: if the file exists or cannot be written, or if training would stop at its
            schedule.
    """
    check_is_new(file)
    weights = cfg.MODEL.TIMM.PRETRAINED
    base, reason = choose_base(weights)
    values = flatten_config(cfg)
    given = {key: values[key] for key in keys if not key.startswith("DATASETS.")}
    content = suggest_config(cfg, sets, CONFIGS_FOLDER / base, f"output/{file.stem}", given)
    if weights:
        content["MODEL"]["TIMM"] = {"PRETRAINED": weights}
    for key, value in given.items():
        _set(content, key, value)
    text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None)
    try:
        written = _load_for_training(text, method, num_gpus)
    except UsageError as error:
        raise UsageError(f"{file} was not written: {error}") from error
    start = _describe_start(written, base, reason, file) if reason else ""
    machine = "GPUs" if torch.cuda.is_available() else "a CPU"
    settings = " and your settings" if given else ""
    comments = [
        f"Written by tools/check_data.py for {len(sets.labeled)} labeled and "
        f"{len(sets.unlabeled)} unlabeled images.",
        f"For {machine}. Iterations follow from the number of images{settings}.",
        *textwrap.wrap(
            f"It {start}." if start else "", 96, break_long_words=False, break_on_hyphens=False
        ),
    ]
    text = "".join(f"# {comment}\n" for comment in comments) + text
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(file, text.encode())
    except OSError as error:
        raise UsageError(f"cannot write {file}: {error.strerror}") from error
    return written, start


def _describe_start(written: CfgNode, base: str, reason: str, file: Path) -> str:
    """Say from which weights a written config starts, and why not from the usual ones."""
    has_weights = written.MODEL.WEIGHTS or starts_from_timm_weights(written)
    start = f"is based on configs/{base}" if has_weights else "trains from random weights"
    return (
        f"{start}: {reason}. To do so, remove {file} and repeat the command with "
        "MODEL.TIMM.PRETRAINED <file>"
    )


def check_is_new(file: Path) -> None:
    """Check that the file of a config does not exist yet.

    Raises:
        UsageError: if it does.
    """
    if file.exists():
        raise UsageError(f"{file} already exists: remove it, or write to another file")


def _load_for_training(text: str, method: str, num_gpus: int) -> CfgNode:
    """Load the text of a config, and check batch sizes and schedule as training does."""
    with TemporaryDirectory() as folder:
        file = Path(folder, "config.yaml")
        file.write_bytes(text.encode())
        cfg = load_config(str(file), [], method)
    scale_to_world_size(cfg, num_gpus)
    return cfg


def choose_base(weights: str) -> tuple[str, str]:
    """Choose the config to derive from, by the GPUs of this machine.

    Args:
        weights: ``MODEL.TIMM.PRETRAINED`` of the user; empty for that of the config.

    Returns:
        file in ``configs/``; and why the usual one cannot be used, if so.

    Raises:
        UsageError: if the user's weights do not exist.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    usual = EIGHT_GPUS_BASE if gpus >= 8 else GPU_BASE if gpus else CPU_BASE
    if weights:
        options = ["MODEL.TIMM.PRETRAINED", weights]
        find_pretrained(load_config(str(CONFIGS_FOLDER / usual), options))
        return usual, ""
    fallbacks = GPU_FALLBACKS if gpus else CPU_FALLBACKS
    reason = ""
    for base in (usual, *fallbacks[:-1]):
        cfg = load_config(str(CONFIGS_FOLDER / base), [])
        try:
            find_pretrained(cfg)
            check_weights_exist(cfg.MODEL.WEIGHTS)
        except UsageError as error:
            reason = reason or str(error)
        else:
            return base, reason
    return fallbacks[-1], reason


def base_and_options(options: list[str]) -> tuple[Path, list[str]]:
    """Choose the config for checks of data that come without one, and complete the user's options.

    An example config names its own data sets. The returned options reset these keys to defaults.

    Args:
        options: ``KEY VALUE`` pairs of the user.

    Returns:
        config that :func:`write_config` derives from; and the options to load it with.

    Raises:
        UsageError: as :func:`choose_base`.
    """
    base = CONFIGS_FOLDER / choose_base(load_config("", options).MODEL.TIMM.PRETRAINED)[0]
    default, own = load_config("", []).DATASETS, load_config(str(base), []).DATASETS
    reset = [
        part
        for key, value in default.items()
        if value != own[key]
        for part in (f"DATASETS.{key}", str(value))
    ]
    return base, [*reset, *options]


def suggest_config(
    cfg: CfgNode, sets: TrainingSets, base: Path, output: str, given: Mapping[str, Any]
) -> dict:
    """Content of the config: differences to a base config.

    Args:
        cfg: config that names the data sets.
        sets: the data sets as training will use them.
        base: the config to derive from.
        output: ``OUTPUT_DIR``.
        given: keys that the user has set, with their values; the schedule follows from them.
    """
    base_cfg = load_config(str(base), [])
    data = {key: list(cfg.DATASETS[key]) for key in ("TRAIN", "UNLABELED", "TEST")}
    data |= _differences(cfg.DATASETS, base_cfg.DATASETS)
    data["CLASS_NAMES"] = list(sets.class_names)
    content: dict[str, Any] = {
        "_BASE_": str(base),
        "MODEL": {"ROI_HEADS": {"NUM_CLASSES": len(sets.class_names)}},
        "DATASETS": data,
    }
    values = {**flatten_config(base_cfg), **given}
    schedule = suggest_schedule(len(sets.labeled), len(sets.unlabeled), values, given)
    for key, value in schedule.items():
        _set(content, key, value)
    return content | {"OUTPUT_DIR": output}


def suggest_schedule(
    labeled: int, unlabeled: int, values: Mapping[str, Any], given: Collection[str]
) -> dict[str, Any]:
    """Keys of a schedule that follows from the numbers of images.

    ``SEMI.BURN_IN_ITERS`` is less than ``SOLVER.MAX_ITER`` unless the user sets both: a
    ``SOLVER.MAX_ITER`` below the suggestion shortens burn-in by the same factor.

    Args:
        labeled: number of labeled images.
        unlabeled: number of unlabeled images.
        values: batch sizes, warmup and EMA keep rate of the base config, and the given keys.
        given: keys that the user has set.
    """
    batch, unlabeled_batch = (
        max(1, values[f"SOLVER.{key}"]) for key in ("IMS_PER_BATCH", "IMS_PER_BATCH_UNLABELED")
    )
    burn_in = _clamp(BURN_IN_EPOCHS * labeled // batch, MIN_BURN_IN, MAX_BURN_IN)
    mutual = _clamp(UNLABELED_EPOCHS * unlabeled // unlabeled_batch, MIN_MUTUAL, MAX_MUTUAL)
    if "SEMI.BURN_IN_ITERS" in given:
        burn_in = values["SEMI.BURN_IN_ITERS"]
    elif "SOLVER.MAX_ITER" in given:
        burn_in = min(burn_in, burn_in * values["SOLVER.MAX_ITER"] // (burn_in + mutual))
    iterations = values["SOLVER.MAX_ITER"] if "SOLVER.MAX_ITER" in given else burn_in + mutual
    period = max(1, iterations // EVALUATIONS)
    labeled_only = min(burn_in, iterations) or iterations
    return {
        "SEMI.BURN_IN_ITERS": burn_in,
        "SEMI.EMA_KEEP_RATE": min(
            values["SEMI.EMA_KEEP_RATE"], highest_keep_rate(iterations - burn_in)
        ),
        "SOLVER.MAX_ITER": iterations,
        "SOLVER.WARMUP_ITERS": min(values["SOLVER.WARMUP_ITERS"], labeled_only // 3),
        "SOLVER.STEPS": [iterations * 2 // 3, iterations * 8 // 9]
        if iterations > MAX_ITER_WITHOUT_STEPS
        else [],
        "SOLVER.CHECKPOINT_PERIOD": period,
        "TEST.EVAL_PERIOD": period,
        "VIS_PERIOD": period,
    }


def _differences(node: CfgNode, base: CfgNode) -> dict:
    """Keys whose values differ from those of a base config, without empty sections."""
    differences: dict = {}
    for key, value in node.items():
        if isinstance(value, CfgNode):
            if inner := _differences(value, base[key]):
                differences[key] = inner
        elif value != base[key]:
            differences[key] = list(value) if isinstance(value, tuple) else value
    return differences


def _set(content: dict, key: str, value: object) -> None:
    *sections, name = key.split(".")
    for section in sections:
        content = content.setdefault(section, {})
    content[name] = list(value) if isinstance(value, tuple) else value


def _clamp(value: int, lowest: int, highest: int) -> int:
    return min(max(value, lowest), highest)
