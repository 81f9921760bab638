"""A complete config for the user's data, for ``tools/check_data.py --write-config``."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from detectron2.config import CfgNode

from ..checkpoint.timm_weights import find_pretrained
from ..config import CONFIGS_FOLDER, load_config
from ..data.training_sets import TrainingSets
from ..errors import UsageError
from ..file_io import atomic_write_bytes
from .run_folder import flatten_config

CPU_BASE = "detectors/cpu-mobilenetv2.yaml"
GPU_BASE = "detectors/gpu-resnet50.yaml"
EIGHT_GPUS_BASE = "detectors/eight-gpus-convnext-small.yaml"
# Where the pretrained weights of these cannot be downloaded: random weights on a CPU, and
# Detectron2's ResNet-50, which training reports if it is missing as well.
CPU_FALLBACK, GPU_FALLBACK = "bccd-small.yaml", "Base-LocReweight.yaml"

# Epochs of the labeled images in burn-in and of the unlabeled images after it, and the limits of
# the numbers of iterations that follow. The upper ones are the paper's for COCO.
BURN_IN_EPOCHS, MIN_BURN_IN, MAX_BURN_IN = 50, 300, 2000
UNLABELED_EPOCHS, MIN_MUTUAL, MAX_MUTUAL = 30, 600, 178_000
EVALUATIONS = 10


def write_config(file: Path, cfg: CfgNode, sets: TrainingSets, keys: Sequence[str] = ()) -> None:
    """Write a config with data, classes, a detector that fits the machine, and a schedule.

    Args:
        file: file to write; must not exist.
        cfg: config that names the data sets.
        sets: the data sets as training will use them.
        keys: further keys that the file takes from ``cfg``, because the user has set them.

    Raises:
        UsageError: if the file exists or cannot be written.
    """
    if file.exists():
        raise UsageError(f"{file} already exists: remove it, or write to another file")
    weights = cfg.MODEL.TIMM.PRETRAINED
    base, reason = choose_base(weights)
    content = suggest_config(cfg, sets, CONFIGS_FOLDER / base, f"output/{file.stem}")
    if weights:
        content["MODEL"]["TIMM"] = {"PRETRAINED": weights}
    for key in keys:
        if not key.startswith("DATASETS."):
            _set(content, key, flatten_config(cfg)[key])
    machine = "GPUs" if torch.cuda.is_available() else "a CPU"
    comments = [
        f"Written by tools/check_data.py for {len(sets.labeled)} labeled and "
        f"{len(sets.unlabeled)} unlabeled images.",
        f"For {machine}. Iterations follow from the number of images.",
        *textwrap.wrap(reason, 96),
    ]
    text = "".join(f"# {comment}\n" for comment in comments)
    text += yaml.safe_dump(content, sort_keys=False, default_flow_style=None)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(file, text.encode())
    except OSError as error:
        raise UsageError(f"cannot write {file}: {error.strerror}") from error


def choose_base(weights: str) -> tuple[str, str]:
    """Choose the config to derive from, by the GPUs of this machine.

    Args:
        weights: ``MODEL.TIMM.PRETRAINED`` of the user; empty for that of the config.

    Returns:
        file in ``configs/``; and why it is not one with pretrained weights of timm, if so.

    Raises:
        UsageError: if the user's weights do not exist.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    base = EIGHT_GPUS_BASE if gpus >= 8 else GPU_BASE if gpus else CPU_BASE
    options = ["MODEL.TIMM.PRETRAINED", weights] if weights else []
    try:
        find_pretrained(load_config(str(CONFIGS_FOLDER / base), options))
    except UsageError as error:
        if weights:
            raise
        return (GPU_FALLBACK if gpus else CPU_FALLBACK), f"Not from configs/{base}: {error}."
    return base, ""


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


def suggest_config(cfg: CfgNode, sets: TrainingSets, base: Path, output: str) -> dict:
    """Content of the config: differences to a base config.

    Args:
        cfg: config that names the data sets.
        sets: the data sets as training will use them.
        base: the config to derive from.
        output: ``OUTPUT_DIR``.
    """
    base_cfg = load_config(str(base), [])
    solver = base_cfg.SOLVER
    burn_in = _clamp(
        BURN_IN_EPOCHS * len(sets.labeled) // solver.IMS_PER_BATCH, MIN_BURN_IN, MAX_BURN_IN
    )
    mutual = _clamp(
        UNLABELED_EPOCHS * len(sets.unlabeled) // max(1, solver.IMS_PER_BATCH_UNLABELED),
        MIN_MUTUAL,
        MAX_MUTUAL,
    )
    iterations = burn_in + mutual
    period = max(1, iterations // EVALUATIONS)
    data = {key: list(cfg.DATASETS[key]) for key in ("TRAIN", "UNLABELED", "TEST")}
    data |= _differences(cfg.DATASETS, base_cfg.DATASETS)
    data["CLASS_NAMES"] = list(sets.class_names)
    return {
        "_BASE_": str(base),
        "MODEL": {"ROI_HEADS": {"NUM_CLASSES": len(sets.class_names)}},
        "DATASETS": data,
        "SEMI": {"BURN_IN_ITERS": burn_in},
        "SOLVER": {
            "MAX_ITER": iterations,
            "STEPS": [iterations * 2 // 3, iterations * 8 // 9],
            "CHECKPOINT_PERIOD": period,
        },
        "TEST": {"EVAL_PERIOD": period},
        "VIS_PERIOD": period,
        "OUTPUT_DIR": output,
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
