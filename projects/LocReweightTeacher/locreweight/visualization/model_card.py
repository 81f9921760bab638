"""What a model zoo says to people: a card for each model, and a table of all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from detectron2.config import CfgNode
from tabulate import tabulate

from ..checkpoint.zoo import CONFIG, ZooEntry
from ..data.image_io import read_rgb
from ..engine.predictor import Predictor
from .drawing import draw_detections, grid, save_picture

PICTURE = "detections.jpg"
SIDE, COLUMNS, LEAST_SCORE = 480, 3, 0.5  # of the picture: longer side of each image, in pixels
MAIN_METRICS = ("AP", "AP50", "AP75")

_CARD = """\
---
{license_field}library_name: detectron2
pipeline_tag: object-detection
---

# {name}

{description}A Faster R-CNN that finds {classes}.
It is the teacher of a training of LocReweightTeacher, after {iterations} iterations.
{picture}
## Results

{results}

On `{test_sets}`, in percent.

## Use it

`LOCREWEIGHT_ZOO` names the folder or the address of the zoo that this model lies in.

```python
from locreweight import model_zoo
model = model_zoo.get("{name}", trained=True).eval()
```

```sh
python train_net.py --config-file locreweight://{name}.yaml --eval-only \\
  MODEL.WEIGHTS locreweight://{name} DATASETS.TEST "('coco:val.json:val',)"
```

Classes, in the order of the model: {class_names}.

## Training

```sh
{command}
```

With {versions}. The full config is [{config}]({config}).

Labeled data `{labeled}`, unlabeled data `{unlabeled}`.

## Files

{files}

License of the weights: {license}.
"""


def card(entry: ZooEntry, cfg: CfgNode, description: str = "", *, picture: bool = True) -> str:
    """The model card, in Markdown.

    Args:
        entry: what the zoo says of the model.
        cfg: the config that is published with it.
        description: a paragraph of whoever publishes it.
        picture: whether there is one of its detections.
    """
    detections = f"\n![Detections: class, score and localization quality]({PICTURE})\n"
    results = [[name, value] for name, value in entry.metrics.items()]
    return _CARD.format(
        name=entry.name,
        license_field=f"license: {entry.license}\n" if entry.license else "",
        license=entry.license or "not stated; ask whoever published them",
        description=f"{description.strip()}\n\n" if description.strip() else "",
        classes=_listed(entry.class_names),
        class_names=", ".join(f"{i} {name}" for i, name in enumerate(entry.class_names)),
        iterations=entry.iterations,
        picture=detections if picture else "",
        results=_table(["metric", "value"], results) if results else "It was not evaluated.",
        test_sets=_names(cfg.DATASETS.TEST),
        labeled=_names(cfg.DATASETS.TRAIN),
        unlabeled=_names(cfg.DATASETS.UNLABELED),
        command=entry.training_command,
        versions=", ".join(f"{name} {version}" for name, version in entry.versions.items()),
        config=CONFIG,
        files=_table(["file", "SHA-256"], sorted(entry.sha256.items())),
    )


def draw_examples(detector: Predictor, files: Sequence[str], folder: Path) -> None:
    """Write the card's picture: what a model finds in some images.

    Args:
        detector: the published one.
        files: images.
        folder: of the card.
    """
    pictures = []
    for file in files:
        image = read_rgb(file)
        (found,) = detector.detect([image])
        sure = found[found.scores > LEAST_SCORE]
        quality = detector.has_localization_quality
        pictures.append(draw_detections(image, sure, detector.class_names, SIDE, quality=quality))
    rows = [pictures[i : i + COLUMNS] for i in range(0, len(pictures), COLUMNS)]
    save_picture(grid(rows), folder / PICTURE)


def zoo_page(entries: Iterable[ZooEntry]) -> str:
    """The table of all models, in Markdown."""
    rows = [
        [
            f"[{entry.name}]({entry.name}/README.md)",
            _listed(entry.class_names),
            *(_main_metric(entry, metric) for metric in MAIN_METRICS),
            entry.license or "not stated",
            f"[{entry.weights}]({entry.name}/{entry.weights})",
        ]
        for entry in entries
    ]
    headers = ["model", "classes", *MAIN_METRICS, "license", "weights"]
    return (
        "# Model zoo\n\nWritten by `tools/publish.py` of LocReweightTeacher. With LOCREWEIGHT_ZOO "
        f"set to this folder or its address,\n`locreweight://<model>` names one.\n\n"
        f"{_table(headers, rows)}\n"
    )


def _main_metric(entry: ZooEntry, metric: str) -> float | str:
    """The first test set's; several are told apart by what comes before."""
    values = [value for key, value in entry.metrics.items() if key.endswith(f"bbox/{metric}")]
    return values[0] if values else ""


def _table(headers: list[str], rows: list) -> str:
    return tabulate(rows, headers=headers, tablefmt="github", floatfmt=".2f")


def _names(data_sets: Iterable[str]) -> str:
    return ", ".join(data_sets) or "none"


def _listed(class_names: list[str]) -> str:
    shown = ", ".join(class_names[:5])
    return shown if len(class_names) <= 5 else f"{shown} and {len(class_names) - 5} more"
