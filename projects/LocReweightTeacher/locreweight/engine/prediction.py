"""Apply a detector to files and write what it finds."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

from ..data.datasets.shards import ShardedImages
from ..data.training_sets import load_training_sets, register_datasets
from ..errors import UsageError
from .detection_files import DetectionWriter, common_folder
from .detections import check_class_names
from .inference import InputFile, detect_in_files
from .predictor import Predictor

_NO_UNLABELED = "the checkpoint's config lacks labeled or unlabeled images: give --input"


@dataclass
class PredictionSummary:
    """What :func:`predict_files` has done.

    Attributes:
        images: number of images and frames.
        objects: number of objects in them.
        unreadable: a message for each input that could not be read.
        interrupted: whether Ctrl-C ended it. All files up to there are complete.
    """

    images: int = 0
    objects: int = 0
    unreadable: list[str] = field(default_factory=list)
    interrupted: bool = False


def predict_files(
    detector: Predictor,
    files: Sequence[InputFile],
    writers: Sequence[DetectionWriter],
    *,
    classes: Collection[str] = (),
    batch: int | None = None,
    max_frames: int | None = None,
) -> PredictionSummary:
    """Detect objects in images, videos and streams, and pass them to writers.

    Args:
        detector: trained detector. Objects above its ``threshold`` are kept.
        files: the inputs.
        writers: each gets the detections of all images, and is closed at the end.
        classes: names of the classes to keep; empty for all.
        batch: number of images per batch. Default: 8 on a GPU, else 1.
        max_frames: largest number of frames of each video or stream.

    Raises:
        UsageError: if a class does not exist, or a file cannot be written.
    """
    check_class_names(classes, detector.class_names)
    summary = PredictionSummary()
    with ExitStack() as stack:
        for writer in writers:
            stack.enter_context(closing(writer))
        found = detect_in_files(detector, files, batch, summary.unreadable, max_frames)
        try:
            for frame, unfiltered in found:
                detections = unfiltered.select(detector.threshold, classes)
                for writer in writers:
                    writer.add(frame, detections)
                summary.images += 1
                summary.objects += len(detections)
        except KeyboardInterrupt:
            summary.interrupted = True
    return summary


@dataclass(frozen=True)
class TrainingFiles:
    """Image files of a training. The ``name`` of each is relative to their common folder."""

    labeled: list[InputFile]
    unlabeled: list[InputFile]


def training_files(detector: Predictor) -> TrainingFiles:
    """Return the image files of the detector's config.

    Raises:
        UsageError: if a dataset does not exist, or the config lacks labeled images or unlabeled
            ones in files.
    """
    data = detector.cfg.DATASETS
    has_unlabeled = data.UNLABELED or data.SPLIT_FILE or data.LABELED_PERCENT < 100
    if not (data.TRAIN and has_unlabeled):  # such as a plain Detectron2 run
        raise UsageError(_NO_UNLABELED)
    register_datasets(detector.cfg)
    sets = load_training_sets(detector.cfg)
    if not sets.unlabeled:
        raise UsageError(_NO_UNLABELED)
    if isinstance(sets.unlabeled, ShardedImages):
        raise UsageError(
            "the unlabeled images of the checkpoint's config are in shards, not in files: give "
            "--input with the images that were packed"
        )
    return TrainingFiles(input_files(sets.labeled), input_files(sets.unlabeled))


def input_files(records: Iterable[dict]) -> list[InputFile]:
    """Return the image files of dataset records, with names relative to their common folder."""
    files = [Path(record["file_name"]).absolute() for record in records]
    root = common_folder(files)
    return [InputFile(file, file.relative_to(root)) for file in files]
