"""What a finished run has to hand on: its teacher, and what is known of it."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import detectron2
import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from torch import Tensor

from ..checkpoint.checkpointer import CheckpointDescription
from ..checkpoint.safe_loading import read_weights
from ..checkpoint.zoo import CONFIG
from ..config import load_config
from ..data.training_sets import register_datasets
from ..errors import UsageError
from .run_folder import read_metrics as metrics_of
from .run_record import read_run_records

METRICS = ("bbox/", "voc_11_point/")


@dataclass(frozen=True)
class TrainedModel:
    """The teacher of a run and what is known of it; nothing in it has been made shareable yet.

    Attributes:
        checkpoint: its file.
        cfg: the config of the run.
        weights: of the teacher.
        class_names: in the order of its classes.
        iterations: of training that it has seen.
        metrics: of the evaluation at that time, by name, in percent.
        command: that trained it.
        versions: of what it was trained with.
    """

    checkpoint: Path
    cfg: CfgNode
    weights: dict[str, Tensor]
    class_names: list[str]
    iterations: int
    metrics: dict[str, float]
    command: str
    versions: dict[str, str]


def read_run(output: Path, *, last: bool = False) -> TrainedModel:
    """The best teacher of a run; of one without evaluations, or if wished, the last.

    Raises:
        UsageError: if the folder is no run's, or what it holds is damaged or incomplete.
    """
    if not (output / CONFIG).is_file():
        raise UsageError(f"{output} is not the OUTPUT_DIR of a run: it has no {CONFIG}")
    cfg = load_config(str(output / CONFIG), [])
    file = _checkpoint_of(output, last=last)
    content = _read_checkpoint(file)
    broken = [name for name, value in content["model"].items() if not value.isfinite().all()]
    if broken:
        raise UsageError(f"{file} has weights that are infinite or NaN, such as {broken[0]}")
    iterations = content["trainer"]["iteration"] + 1
    command, versions = _origin_of(output)
    return TrainedModel(
        checkpoint=file,
        cfg=cfg,
        weights=content["model"],
        class_names=_class_names_of(cfg, content),
        iterations=iterations,
        metrics=_metrics_of(output, iterations, cfg.SOLVER.MAX_ITER),
        command=command,
        versions=versions,
    )


def _checkpoint_of(output: Path, *, last: bool) -> Path:
    best, pointer = output / "model_best.pth", output / "last_checkpoint"
    if best.is_file() and not last:
        return best
    if not pointer.is_file():
        raise UsageError(f"{output} has no checkpoint yet")
    # A checkpoint to resume from, or the best one, can be written after the final one.
    named = output / pointer.read_text().strip()
    final = output / "model_final.pth"
    return final if final.is_file() else named


def _read_checkpoint(file: Path) -> dict[str, Any]:
    content = read_weights(str(file))
    if not (isinstance(content, dict) and {"model", "student", "trainer"} <= content.keys()):
        raise UsageError(f"{file} is not of a training here: it has no teacher beside a student")
    return content


def _class_names_of(cfg: CfgNode, checkpoint: Mapping[str, Any]) -> list[str]:
    description = CheckpointDescription.from_fields(checkpoint)
    if description:
        return description.class_names
    try:  # of an earlier version
        register_datasets(cfg, training=False)
        for name in cfg.DATASETS.TEST:
            if not hasattr(MetadataCatalog.get(name), "thing_classes"):
                DatasetCatalog.get(name)  # a COCO json says its classes when it is read
            return list(MetadataCatalog.get(name).thing_classes)
        raise UsageError("there is no test set")
    except UsageError as error:
        raise UsageError(
            f"the checkpoint does not say its class names, and they cannot be looked up: {error}"
        ) from error


def _metrics_of(output: Path, iterations: int, end: int) -> dict[str, float]:
    """Of the evaluation after so many iterations; none if there was none."""
    found: dict[str, float] = {}
    for record in metrics_of(output) if (output / "metrics.json").is_file() else []:
        # Earlier versions logged the last evaluation under the number after it.
        if min(record["iteration"] + 1, end) == iterations:
            found |= {
                name: value
                for name, value in record.items()
                if not name.startswith("student/")
                and any(part in name for part in METRICS)
                and math.isfinite(value)
            }
    return found


def _origin_of(output: Path) -> tuple[str, dict[str, str]]:
    """The command that began a run and the versions that ended it, as far as it kept them."""
    starts = read_run_records(output)
    if starts:
        commit = {"commit": starts[-1].commit} if starts[-1].commit else {}
        return starts[0].command, starts[-1].versions | commit
    # The config holds all that the command line said.
    return f"python train_net.py --config-file {CONFIG}", {
        "locreweight": importlib.metadata.version("locreweight"),
        "PyTorch": torch.__version__,
        "torchvision": torchvision.__version__,
        "Detectron2": detectron2.__version__,
    }
