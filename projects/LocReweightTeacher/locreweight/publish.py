"""Publishing a trained model as an entry of a model zoo."""

from __future__ import annotations

import importlib.metadata
import math
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import detectron2
import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from torch import Tensor

from .checkpoint.checkpointer import THRESHOLD_FIELD, CheckpointDescription
from .checkpoint.files import choose_checkpoint
from .checkpoint.safe_loading import SAFETENSORS_SUFFIX, read_weights, write_safetensors
from .checkpoint.sharing import shareable, shareable_command, shareable_config
from .checkpoint.zoo import CONFIG, ENTRY, INDEX, PAGE, ZooEntry, check_name, write_index
from .config import load_config
from .data.datasets.image_folders import load_folder
from .data.training_sets import register_datasets
from .engine.predictor import Predictor, class_names_of_data
from .engine.run_folder import RunFolder
from .errors import UsageError
from .export.stock import write_stock_detector
from .file_io import sha256_of
from .run_files import CONFIG_FILE
from .visualization.model_card import draw_examples, model_card, zoo_page

METRICS = ("bbox/", "voc_11_point/")  # prefixes of the published metrics


@dataclass(frozen=True)
class PublishOptions:
    """Options of :func:`publish`.

    Attributes:
        name: name of the model in the zoo.
        license: SPDX identifier of the license of the weights, such as ``cc-by-4.0``.
        description: a paragraph for the model card.
        pickle: also export the weights for plain Detectron2.
        pictures: number of images in the picture of the model card.
        images: folder of these images; empty for images of the test set.
        replace: replace an existing entry of this name.
    """

    name: str
    license: str = ""
    description: str = ""
    pickle: bool = False
    pictures: int = 6
    images: str = ""
    replace: bool = False


@dataclass(frozen=True)
class TrainedModel:
    """Teacher of a run, before private paths are removed.

    Attributes:
        checkpoint: file that contains the teacher.
        cfg: config of the run.
        weights: state dict of the teacher.
        class_names: in the order of the model's classes.
        iterations: training iterations.
        metrics: results of the evaluation after these iterations, in percent.
        command: command line of the training.
        versions: package -> version of the training.
        score_threshold: the score threshold with the best F1 on the test set; None if not known.
    """

    checkpoint: Path
    cfg: CfgNode
    weights: dict[str, Tensor]
    class_names: list[str]
    iterations: int
    metrics: dict[str, float]
    command: str
    versions: dict[str, str]
    score_threshold: float | None = None


def publish(trained: TrainedModel, zoo: Path, options: PublishOptions) -> ZooEntry:
    """Write an entry of a zoo, and update the index and the README of the zoo.

    Args:
        trained: the model.
        zoo: folder of the zoo; created if it does not exist.
        options: what to write.

    Raises:
        UsageError: if the entry would overwrite something, or there are no images for the picture.
    """
    name = check_name(options.name)
    folder = zoo / name
    _check_target(zoo, name, replace_it=options.replace)
    images = _images_to_draw(trained.cfg, options)
    zoo.mkdir(parents=True, exist_ok=True)
    # Rename the entry when it is complete. The temporary folder must be on the same disk.
    with tempfile.TemporaryDirectory(prefix=".publish-", dir=zoo) as scratch:
        new_entry = Path(scratch) / "entry"
        new_entry.mkdir()
        entry = _write_entry(trained, new_entry, replace(options, name=name), images)
        if folder.exists():
            folder.rename(Path(scratch) / "replaced")
        folder.parent.mkdir(parents=True, exist_ok=True)
        new_entry.rename(folder)
    (zoo / PAGE).write_text(zoo_page(write_index(zoo)))
    return entry


def _check_target(zoo: Path, name: str, *, replace_it: bool) -> None:
    if "://" in str(zoo) or ":/" in str(zoo):
        raise UsageError(
            f"{zoo} is not a folder: publish to a folder, which a web server can serve"
        )
    file = next((path for path in (zoo, *zoo.parents) if path.is_file()), None)
    if file:
        raise UsageError(f"{file} is a file: publish to a folder")
    if zoo.exists() and not (zoo / INDEX).is_file() and any(zoo.iterdir()):
        raise UsageError(f"{zoo} is neither empty nor a model zoo: it has no {INDEX}")
    folder = zoo / name
    above = [
        parent for parent in folder.relative_to(zoo).parents if (zoo / parent / ENTRY).exists()
    ]
    below = [file.parent for file in folder.rglob(ENTRY) if file.parent != folder]
    if above or below:
        other = zoo / above[0] if above else below[0]
        raise UsageError(f"{name!r} and the model in {other} would be nested: rename one")
    if folder.exists() and not replace_it:
        raise UsageError(f"{zoo} already has {name!r}: use another --name, or add --replace")


def _write_entry(
    trained: TrainedModel, folder: Path, options: PublishOptions, images: list[str]
) -> ZooEntry:
    shared = shareable_config(trained.cfg, options.name)
    (folder / CONFIG).write_text(shared.dump())
    weights = folder / f"unnamed{SAFETENSORS_SUFFIX}"
    write_safetensors(
        weights,
        trained.weights,
        corner_coding=shared.MODEL.ROI_BOX_HEAD.CORNER_CODING,
        config=shared.dump(),
        class_names=trained.class_names,
        score_threshold=trained.score_threshold,
    )
    # safetensors creates files that only the owner can read.
    shutil.copymode(folder / CONFIG, weights)
    name = f"{trained.checkpoint.stem}_{sha256_of(weights)[:8]}{SAFETENSORS_SUFFIX}"
    weights = weights.rename(folder / name)
    if options.pickle:
        _write_for_detectron2(shared, trained.weights, folder)
    entry = ZooEntry(
        name=options.name,
        weights=weights.name,
        sha256={file.name: sha256_of(file) for file in sorted(folder.iterdir())},
        class_names=trained.class_names,
        metrics=_shareable_metrics(trained),
        iterations=trained.iterations,
        license=options.license,
        training_command=shareable_command(trained.command),
        versions=trained.versions,
    )
    (folder / ENTRY).write_text(entry.as_json())
    if images:
        draw_examples(Predictor(weights), images, folder)
    text = model_card(entry, shared, options.description, picture=bool(images))
    (folder / PAGE).write_text(text)
    return entry


def _write_for_detectron2(cfg: CfgNode, state: Mapping[str, Tensor], folder: Path) -> None:
    weights, config = write_stock_detector(folder / "detectron2", cfg, state)
    named = weights.rename(folder / f"detectron2_{sha256_of(weights)[:8]}.pkl")
    config.write_text(config.read_text().replace(weights.name, named.name))


def _shareable_metrics(trained: TrainedModel) -> dict[str, float]:
    """Metrics, with private paths removed from the names of test sets in their names."""
    metrics = trained.metrics
    for name in trained.cfg.DATASETS.TEST:
        metrics = {key.replace(name, shareable(name)): value for key, value in metrics.items()}
    return metrics


def _images_to_draw(cfg: CfgNode, options: PublishOptions) -> list[str]:
    if options.pictures < 0:
        raise UsageError(f"--pictures is {options.pictures}; it must be 0 or larger")
    if not options.pictures:
        return []
    if options.images:
        records = load_folder(options.images)
    elif cfg.DATASETS.TEST:
        register_datasets(cfg, training=False)
        records = DatasetCatalog.get(cfg.DATASETS.TEST[0])
    else:
        raise UsageError(
            "the config has no test set to take pictures from: use --images FOLDER or --pictures 0"
        )
    step = max(1, len(records) // options.pictures)
    return [record["file_name"] for record in records[::step][: options.pictures]]


def read_trained_model(output: Path, *, last: bool = False) -> TrainedModel:
    """Read the best teacher of a run.

    Args:
        output: ``OUTPUT_DIR`` of the run.
        last: read the last teacher instead. Without evaluations, there is only the last one.

    Raises:
        UsageError: if the folder does not belong to a run, or is damaged or incomplete.
    """
    if not (output / CONFIG_FILE).is_file():
        raise UsageError(f"{output} is not the OUTPUT_DIR of a run: it has no {CONFIG_FILE}")
    cfg = load_config(str(output / CONFIG_FILE), [])
    file = choose_checkpoint(output, last=last)
    content = _read_checkpoint(file)
    bad = [name for name, value in content["model"].items() if not value.isfinite().all()]
    if bad:
        raise UsageError(f"{file} has weights that are infinite or NaN, such as {bad[0]}")
    iterations = content["trainer"]["iteration"] + 1
    run = RunFolder(output)
    command, versions = _origin_of(run)
    return TrainedModel(
        checkpoint=file,
        cfg=cfg,
        weights=content["model"],
        class_names=_class_names_of(cfg, content),
        iterations=iterations,
        metrics=_metrics_of(run, iterations, cfg.SOLVER.MAX_ITER),
        command=command,
        versions=versions,
        score_threshold=content.get(THRESHOLD_FIELD),
    )


def _read_checkpoint(file: Path) -> dict[str, Any]:
    content = read_weights(str(file))
    if not (isinstance(content, dict) and {"model", "student", "trainer"} <= content.keys()):
        raise UsageError(f"{file} was not written by this project: it has no teacher and student")
    return content


def _class_names_of(cfg: CfgNode, checkpoint: Mapping[str, Any]) -> list[str]:
    description = CheckpointDescription.from_checkpoint(checkpoint)
    if description:
        return description.class_names
    names = class_names_of_data(cfg)  # for checkpoints of earlier versions
    if not names:
        raise UsageError(
            "the checkpoint does not contain its class names, and the data sets of its config, "
            "which have them, cannot be read on this machine"
        )
    return names


def _metrics_of(run: RunFolder, iterations: int, end: int) -> dict[str, float]:
    """Results of the evaluation after a number of iterations; empty without an evaluation."""
    metrics: dict[str, float] = {}
    for record in run.metrics:
        # Earlier versions logged the last evaluation one iteration later.
        if min(record["iteration"] + 1, end) == iterations:
            metrics |= {
                name: value
                for name, value in record.items()
                if not name.startswith("student/")
                and any(part in name for part in METRICS)
                and math.isfinite(value)
            }
    return metrics


def _origin_of(run: RunFolder) -> tuple[str, dict[str, str]]:
    """Command of the first start of a run, and versions of its last start."""
    starts = run.starts
    if starts:
        commit = {"commit": starts[-1].commit} if starts[-1].commit else {}
        return starts[0].command, starts[-1].versions | commit
    # Runs without a record: the config contains all options of the command line.
    return f"python train_net.py --config-file {CONFIG}", {
        "locreweight": importlib.metadata.version("locreweight"),
        "PyTorch": torch.__version__,
        "torchvision": torchvision.__version__,
        "Detectron2": detectron2.__version__,
    }
