"""Model cards and the README of a model zoo, in Markdown."""

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
SIDE, COLUMNS, MIN_SCORE = 480, 3, 0.5  # of the picture; SIDE is the longer side in pixels
MAIN_METRICS = ("AP", "AP50", "AP75")

_CARD = """\
---
{license_field}library_name: detectron2
pipeline_tag: object-detection
---

# {name}

{description}A Faster R-CNN that detects {classes}.
It is the teacher of a LocReweightTeacher training after {iterations} iterations.
{picture}
## Results

{results}

On `{test_sets}`, in percent. `F1-threshold` is the score threshold with the highest F1, in [0, 1].

## Usage

Set `LOCREWEIGHT_ZOO` to the folder or address of the zoo that contains this model.

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


def model_card(
    entry: ZooEntry, cfg: CfgNode, description: str = "", *, picture: bool = True
) -> str:
    """Format the model card.

    Args:
        entry: the entry of the zoo.
        cfg: the published config.
        description: a paragraph for the card.
        picture: whether the entry has a picture of detections.
    """
    detections = f"\n![Detections: class, score and localization quality]({PICTURE})\n"
    results = [[name, value] for name, value in entry.metrics.items()]
    return _CARD.format(
        name=entry.name,
        license_field=f"license: {entry.license}\n" if entry.license else "",
        license=entry.license or "not stated; ask the publisher",
        description=f"{description.strip()}\n\n" if description.strip() else "",
        classes=_summarize_classes(entry.class_names),
        class_names=", ".join(f"{i} {name}" for i, name in enumerate(entry.class_names)),
        iterations=entry.iterations,
        picture=detections if picture else "",
        results=_table(["metric", "value"], results) if results else "Not evaluated.",
        test_sets=_names(cfg.DATASETS.TEST),
        labeled=_names(cfg.DATASETS.TRAIN),
        unlabeled=_names(cfg.DATASETS.UNLABELED),
        command=entry.training_command,
        versions=", ".join(f"{name} {version}" for name, version in entry.versions.items()),
        config=CONFIG,
        files=_table(["file", "SHA-256"], sorted(entry.sha256.items())),
    )


def draw_examples(detector: Predictor, files: Sequence[str], folder: Path) -> None:
    """Write the picture of the model card: detections in some images.

    Args:
        detector: the published model.
        files: the images.
        folder: folder of the entry.
    """
    pictures = []
    for file in files:
        image = read_rgb(file)
        (detections,) = detector.detect([image])
        confident = detections[detections.scores > MIN_SCORE]
        quality = detector.has_localization_quality
        names = detector.class_names
        pictures.append(draw_detections(image, confident, names, SIDE, quality=quality))
    rows = [pictures[i : i + COLUMNS] for i in range(0, len(pictures), COLUMNS)]
    save_picture(grid(rows), folder / PICTURE)


def zoo_page(entries: Iterable[ZooEntry]) -> str:
    """Format the README of the zoo: a table of all models."""
    rows = [
        [
            f"[{entry.name}]({entry.name}/README.md)",
            _summarize_classes(entry.class_names),
            *(_main_metric(entry, metric) for metric in MAIN_METRICS),
            entry.license or "not stated",
            f"[{entry.weights}]({entry.name}/{entry.weights})",
        ]
        for entry in entries
    ]
    headers = ["model", "classes", *MAIN_METRICS, "license", "weights"]
    return (
        "# Model zoo\n\nWritten by `tools/publish.py` of LocReweightTeacher. With LOCREWEIGHT_ZOO "
        "set to this folder or its address,\n`locreweight://<model>` is the address of a model."
        "\n\n"
        f"{_table(headers, rows)}\n"
    )


def _main_metric(entry: ZooEntry, metric: str) -> float | str:
    """Metric of the first test set. With several sets, names start with the set."""
    values = [value for key, value in entry.metrics.items() if key.endswith(f"bbox/{metric}")]
    return values[0] if values else ""


def _table(headers: list[str], rows: list) -> str:
    return tabulate(rows, headers=headers, tablefmt="github", floatfmt=".2f")


def _names(data_sets: Iterable[str]) -> str:
    return ", ".join(data_sets) or "none"


def _summarize_classes(class_names: list[str]) -> str:
    first = ", ".join(class_names[:5])
    return first if len(class_names) <= 5 else f"{first} and {len(class_names) - 5} more"
