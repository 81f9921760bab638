"""Write images and their pseudo-labels as a task for a labeling tool."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from enum import Enum
from pathlib import Path

import numpy as np

from ..errors import UsageError
from ..visualization.drawing import captioned, explained, grid, save_picture
from .detection_files import CocoDataset, DetectionWriter, LabelStudioTasks, YoloLabels
from .detections import Detections
from .inference import Frame, InputFile
from .label_suggestion import Suggestion, write_suggestions
from .prediction import predict_files
from .predictor import Predictor

NUM_COLUMNS, NUM_ROWS = 4, 3  # of the overview
OVERVIEW_SIDE = 360  # longer side of each image of the overview, in pixels


LEGEND = (
    "The most useful images. Above each: how uncertain the model is about classes and boxes, and "
    "how much its detections in the mirrored image differ, from 0 to 1. At each box: class, score "
    "and localization quality q; shorter in crowded images."
)


class TaskFormat(str, Enum):
    """Format of the pseudo-labels."""

    COCO = "coco"
    YOLO = "yolo"
    LABEL_STUDIO = "label-studio"

    def __str__(self) -> str:
        return self.value


class OverviewWriter:
    """Draws the first images on one picture."""

    def __init__(self, file: Path, captions: Sequence[str]) -> None:
        """
        Args:
            file: the picture.
            captions: of the images, in their order.
        """
        self._file, self._captions = file, captions
        self._cells: list[np.ndarray] = []

    def add(self, frame: Frame, detections: Detections) -> None:
        if len(self._cells) < NUM_COLUMNS * NUM_ROWS:
            caption = self._captions[len(self._cells)]
            self._cells.append(captioned(detections.draw(OVERVIEW_SIDE), caption))

    def close(self) -> None:
        rows = [self._cells[i : i + NUM_COLUMNS] for i in range(0, len(self._cells), NUM_COLUMNS)]
        if rows:
            save_picture(explained(grid(rows), LEGEND), self._file)


def check_new_folder(folder: Path) -> None:
    """Check that a folder does not exist or is empty.

    Raises:
        UsageError: if it is not empty.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"the folder {folder} is not empty: use a new folder for --output")


def write_labeling_task(
    output: Path,
    detector: Predictor,
    suggestions: Sequence[Suggestion],
    task_format: TaskFormat,
    *,
    copy: bool = False,
) -> str:
    """Write suggested images, their pseudo-labels, an overview and a table of uncertainties.

    Args:
        output: new folder; its content is described in ``tools/suggest_labels.py``.
        detector: predicts the pseudo-labels: objects above its ``threshold``.
        suggestions: the images.
        task_format: format of the pseudo-labels.
        copy: copy the images instead of linking them. Training recognizes a link, but not a copy,
            as the same image.

    Returns:
        the data set for ``DATASETS.TRAIN`` once the labels are corrected.

    Raises:
        UsageError: if the folder is not empty, or two images would have the same YOLO label file.
            Nothing has been written then.
    """
    check_new_folder(output)
    images = output / "images"
    originals = [suggestion.file for suggestion in suggestions]
    writer: DetectionWriter
    names = detector.class_names
    if task_format is TaskFormat.COCO:
        writer = CocoDataset(output / "annotations.json", names, images)
        dataset = f"coco:{output / 'annotations.json'}:{images}"
    elif task_format is TaskFormat.YOLO:
        writer = YoloLabels(output / "labels", names, originals)
        dataset = f"yolo:{images}:{output / 'labels'}"
    else:
        weights = Path(detector.cfg.MODEL.WEIGHTS).absolute()
        model = f"{weights.parent.name}/{weights.stem}"  # such as "mine/model_best"
        writer = LabelStudioTasks(output / "tasks.json", names, output, model)
        dataset = f"coco:<COCO export of Label Studio>:{images}"
    files = [InputFile(images / original.name, original.name) for original in originals]
    for original, file in zip(originals, files, strict=True):
        file.path.parent.mkdir(parents=True, exist_ok=True)
        if copy:
            shutil.copy2(original.path, file.path)
        else:
            file.path.symlink_to(original.path.resolve())
    captions = [
        f"{rank}. classes {s.uncertainty.classes:.2f}, boxes {s.uncertainty.boxes:.2f}, "
        f"views {s.uncertainty.views:.2f}"
        for rank, s in enumerate(suggestions, 1)
    ]
    predict_files(detector, files, [writer, OverviewWriter(output / "overview.jpg", captions)])
    write_suggestions(output / "suggestions.csv", suggestions)
    return dataset
