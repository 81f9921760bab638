#!/usr/bin/env python
"""Hand on a trained model: write an entry of a model zoo.

    python tools/publish.py output/mine --to zoo --license cc-by-4.0

The zoo is a folder, which any web server can offer as it is. What of the run goes into it: the
weights of the teacher as safetensors, the config, class names, results, command, versions, a card
with pictures of detections in test images. Optimizer, student and logs stay behind, and so does
what the machine calls its folders: paths that lead out of the working folder lose all but their
last part.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from torch import Tensor

import locreweight.modeling  # noqa: F401  (registers the model)
from locreweight.checkpoint.safe_loading import SUFFIX, write_safetensors
from locreweight.checkpoint.sharing import shareable, shareable_command, shareable_config
from locreweight.checkpoint.zoo import (
    CONFIG,
    ENTRY,
    INDEX,
    PAGE,
    ZooEntry,
    check_name,
    sha256_of,
    write_index,
)
from locreweight.data.datasets.image_folders import load_folder
from locreweight.data.training_sets import register_datasets
from locreweight.engine.finished_run import TrainedModel, read_run
from locreweight.engine.predictor import load_predictor
from locreweight.errors import UsageError
from locreweight.export.stock import write_stock_detector
from locreweight.visualization.model_card import PICTURE, card, draw_examples, zoo_page


@dataclass(frozen=True)
class PublishOptions:
    """What whoever publishes decides.

    Attributes:
        name: of the model in the zoo.
        license: of the weights, as in SPDX: ``cc-by-4.0``.
        description: a paragraph for the card.
        pickle: write the weights for Detectron2 alone, too.
        pictures: so many images in the card's picture.
        images: a folder of images for it; empty for the test set's.
        replace: overwrite an entry of this name.
    """

    name: str
    license: str = ""
    description: str = ""
    pickle: bool = False
    pictures: int = 6
    images: str = ""
    replace: bool = False


def publish(trained: TrainedModel, zoo: Path, wishes: PublishOptions) -> ZooEntry:
    """Write an entry, and the index and the table of the zoo anew.

    Raises:
        UsageError: if the entry would overwrite something else, or there are no images to draw on.
    """
    name = check_name(wishes.name)
    folder = zoo / name
    _check_free(zoo, name, replace_it=wishes.replace)
    images = _images_to_draw(trained.cfg, wishes)
    zoo.mkdir(parents=True, exist_ok=True)
    # In the zoo only when it is whole; beside it, so that it is on the same disk.
    with tempfile.TemporaryDirectory(prefix=".publish-", dir=zoo) as scratch:
        unfinished = Path(scratch) / "entry"
        unfinished.mkdir()
        entry = _write_entry(trained, unfinished, replace(wishes, name=name), images)
        if folder.exists():
            folder.rename(Path(scratch) / "replaced")
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished.rename(folder)
    (zoo / PAGE).write_text(zoo_page(write_index(zoo)))
    return entry


def _check_free(zoo: Path, name: str, *, replace_it: bool) -> None:
    if "://" in str(zoo) or ":/" in str(zoo):
        raise UsageError(f"{zoo} is no folder: publish into one, and let a server offer it")
    no_folder = next((path for path in (zoo, *zoo.parents) if path.is_file()), None)
    if no_folder:
        raise UsageError(f"{no_folder} is a file: publish into a folder")
    if zoo.exists() and not (zoo / INDEX).is_file() and any(zoo.iterdir()):
        raise UsageError(f"{zoo} is neither empty nor a model zoo: it has no {INDEX}")
    folder = zoo / name
    above = [
        parent for parent in folder.relative_to(zoo).parents if (zoo / parent / ENTRY).exists()
    ]
    below = [file.parent for file in folder.rglob(ENTRY) if file.parent != folder]
    if above or below:
        other = zoo / above[0] if above else below[0]
        raise UsageError(f"{name!r} and the model in {other} would lie in each other: rename one")
    if folder.exists() and not replace_it:
        raise UsageError(f"{zoo} already has {name!r}: choose another --name, or add --replace")


def _write_entry(
    trained: TrainedModel, folder: Path, wishes: PublishOptions, images: list[str]
) -> ZooEntry:
    shared = shareable_config(trained.cfg, wishes.name)
    (folder / CONFIG).write_text(shared.dump())
    weights = folder / f"unnamed{SUFFIX}"
    write_safetensors(
        weights,
        trained.weights,
        corner_coding=shared.MODEL.ROI_BOX_HEAD.CORNER_CODING,
        config=shared.dump(),
        class_names=trained.class_names,
    )
    shutil.copymode(folder / CONFIG, weights)  # safetensors lets nobody else read it
    weights = weights.rename(folder / f"{trained.checkpoint.stem}_{sha256_of(weights)[:8]}{SUFFIX}")
    if wishes.pickle:
        _write_for_detectron2(shared, trained.weights, folder)
    entry = ZooEntry(
        name=wishes.name,
        weights=weights.name,
        sha256={file.name: sha256_of(file) for file in sorted(folder.iterdir())},
        class_names=trained.class_names,
        metrics=_shareable_metrics(trained),
        iterations=trained.iterations,
        license=wishes.license,
        training_command=shareable_command(trained.command),
        versions=trained.versions,
    )
    (folder / ENTRY).write_text(entry.as_json())
    if images:
        draw_examples(load_predictor(str(weights)), images, folder)
    text = card(entry, shared, wishes.description, picture=bool(images))
    (folder / PAGE).write_text(text)
    return entry


def _write_for_detectron2(cfg: CfgNode, state: Mapping[str, Tensor], folder: Path) -> None:
    weights, config = write_stock_detector(folder / "detectron2", cfg, state)
    named = weights.rename(folder / f"detectron2_{sha256_of(weights)[:8]}.pkl")
    config.write_text(config.read_text().replace(weights.name, named.name))


def _shareable_metrics(trained: TrainedModel) -> dict[str, float]:
    """Of several test sets each metric's name begins with that of the set."""
    metrics = trained.metrics
    for name in trained.cfg.DATASETS.TEST:
        metrics = {key.replace(name, shareable(name)): value for key, value in metrics.items()}
    return metrics


def _images_to_draw(cfg: CfgNode, wishes: PublishOptions) -> list[str]:
    if wishes.pictures < 0:
        raise UsageError(f"--pictures is {wishes.pictures}; give a number, or 0 for none")
    if not wishes.pictures:
        return []
    if wishes.images:
        records = load_folder(wishes.images)
    elif cfg.DATASETS.TEST:
        register_datasets(cfg, training=False)
        records = DatasetCatalog.get(cfg.DATASETS.TEST[0])
    else:
        raise UsageError("there is no test set to draw on: give --images FOLDER or --pictures 0")
    step = max(1, len(records) // wishes.pictures)
    return [record["file_name"] for record in records[::step][: wishes.pictures]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="OUTPUT_DIR of the run")
    parser.add_argument("--to", type=Path, required=True, help="folder of the zoo")
    parser.add_argument("--name", help="of the model; that of the folder if not given")
    parser.add_argument("--last", action="store_true", help="the last teacher, not the best")
    parser.add_argument("--license", default="", help="of the weights, as in SPDX: cc-by-4.0")
    parser.add_argument("--description", default="", help="a paragraph for the card")
    parser.add_argument("--pkl", action="store_true", help="also for Detectron2 alone")
    parser.add_argument(
        "--pictures", type=int, default=6, help="images in the card; they are shown"
    )
    parser.add_argument("--images", default="", help="folder to take them from; else the test set")
    parser.add_argument("--replace", action="store_true", help="overwrite the entry of this name")
    args = parser.parse_args()
    wishes = PublishOptions(
        name=args.name or args.run.resolve().name,
        license=args.license,
        description=args.description,
        pickle=args.pkl,
        pictures=args.pictures,
        images=args.images,
        replace=args.replace,
    )
    try:
        entry = publish(read_run(args.run, last=args.last), args.to, wishes)
    except UsageError as error:
        sys.exit(f"error: {error}")
    print(f"{args.to / entry.name}: {entry.weights}, {len(entry.metrics)} metrics")
    if not entry.metrics:
        print("note: the run was not evaluated at this checkpoint, and the card says so")
    if not entry.license:
        print("note: nobody may use weights without a license; state one with --license")
    if wishes.pictures:
        print(f"note: {PICTURE} shows images of the data; see that it may be shown")


if __name__ == "__main__":
    main()
