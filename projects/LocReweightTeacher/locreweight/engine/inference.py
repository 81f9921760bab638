"""Image and video files named on the command line, and detection in many images."""

from __future__ import annotations

import argparse
import glob
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from detectron2.structures import Instances
from tqdm import tqdm

from ..data.datasets.file_names import is_companion
from ..data.datasets.image_folders import IMAGE_SUFFIXES
from ..data.image_io import UnreadableImage, read_rgb
from ..errors import UsageError
from ..visualization.drawing import DrawingStyle, LabelDetail
from .predictor import Predictor

VIDEO_SUFFIXES = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm"}
INPUT_HELP = "images, folders of them, patterns ('data/*.jpg'), or - for paths on standard input"


@dataclass(frozen=True)
class InputFile:
    """An input file.

    Attributes:
        path: the file.
        name: name of its picture, relative to the output folder.
    """

    path: Path
    name: Path

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEO_SUFFIXES


@dataclass(frozen=True)
class ImageDetections:
    """Detections of an image file.

    Attributes:
        file: the file.
        image: ``(H, W, 3)`` uint8 RGB.
        detections: boxes xyxy in absolute pixels of the image.
    """

    file: InputFile
    image: np.ndarray
    detections: Instances


def find_inputs(inputs: Sequence[str], output: Path | None = None) -> list[InputFile]:
    """Find all input files, in order.

    The picture of an image in an input folder gets the image's path relative to that folder, other
    pictures get the name of their image. If a name is already used, a number is added.

    Args:
        inputs: see :data:`INPUT_HELP`.
        output: folder for pictures; files in it are results of earlier calls and are ignored.

    Raises:
        UsageError: if an input does not exist, or there is no input left.
    """
    named: dict[Path, InputFile] = {}
    for item in _expand(inputs):
        for path, name in _files_of(item):
            if output is not None and output.resolve() in path.resolve().parents:
                continue
            picture, number = _picture_name(name), 2
            while picture in named:
                picture = picture.with_name(f"{name.stem}-{number}{picture.suffix}")
                number += 1
            named[picture] = InputFile(path, picture)
    if not named:
        ignored = f" (files in the output folder {output} are ignored)" if output else ""
        raise UsageError(f"there is no image in {' '.join(inputs)}{ignored}")
    return list(named.values())


def picture_file(name: str) -> Path:
    """Argument type for picture files, for ``argparse``."""
    if Path(name).suffix.lower() not in IMAGE_SUFFIXES:
        raise argparse.ArgumentTypeError(f"{name} is not a picture file: use a .jpg or .png")
    return Path(name)


def add_drawing_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--labels`` and ``--line-width``, which :func:`drawing_style` reads."""
    parser.add_argument(
        "--labels",
        choices=[detail.value for detail in LabelDetail],
        default=LabelDetail.SCORE.value,
        help="what is written at each box: nothing, its class, or class, score and localization "
        "quality q. Where the longest texts have no room, shorter ones are written. Default: score",
    )
    parser.add_argument(
        "--line-width",
        type=_line_width,
        default=0,
        metavar="PIXELS",
        help="width of the boxes. Default: 2, more in pictures of over 960 pixels",
    )


def drawing_style(args: argparse.Namespace) -> DrawingStyle:
    """Return the style of the arguments of :func:`add_drawing_arguments`."""
    return DrawingStyle(LabelDetail(args.labels), args.line_width)


def _line_width(text: str) -> int:
    """Argument type for line widths, for ``argparse``."""
    if not text.isdecimal() or not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a width from 1 to 100 pixels")
    return int(text)


def detect_in_files(
    detector: Predictor, files: Sequence[InputFile], batch: int, unreadable: list[str]
) -> Iterator[ImageDetections]:
    """Detect objects in image files, with a progress bar on terminals.

    Args:
        detector: the predictor.
        files: image files, no videos.
        batch: batch size.
        unreadable: a message is appended for each file that cannot be read; it is skipped.
    """
    readable = _readable(tqdm(files, desc="images", disable=None), unreadable)
    for group in _batches(readable, batch):
        results = detector.detect([image for _, image in group])
        for (file, image), detections in zip(group, results, strict=True):
            yield ImageDetections(file, image, detections)


def exit_if_unreadable(unreadable: Sequence[str], count: int) -> None:
    """If files could not be read, name them and exit with code 1."""
    if unreadable:
        for line in unreadable:
            print(f"skipped {line}", file=sys.stderr)
        sys.exit(f"error: {len(unreadable)} of {count} inputs could not be read")


def _readable(
    files: Iterable[InputFile], unreadable: list[str]
) -> Iterator[tuple[InputFile, np.ndarray]]:
    for file in files:
        try:
            yield file, read_rgb(str(file.path))
        except UnreadableImage as error:
            unreadable.append(str(error))


def _batches(
    items: Iterable[tuple[InputFile, np.ndarray]], size: int
) -> Iterator[list[tuple[InputFile, np.ndarray]]]:
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group


def _expand(inputs: Sequence[str]) -> Iterator[str]:
    for item in inputs:
        if item == "-":
            yield from (line.strip() for line in sys.stdin if line.strip())
        elif Path(item).exists() or not glob.has_magic(item):
            yield item
        else:
            matches = sorted(glob.glob(item, recursive=True))
            if not matches:
                raise UsageError(f"no file matches {item!r}")
            yield from matches


def _picture_name(name: Path) -> Path:
    """Name of the output: .mp4 for videos, .jpg for images without an image suffix."""
    suffix = name.suffix.lower()
    if suffix in VIDEO_SUFFIXES:
        return name.with_suffix(".mp4")
    return name if suffix in IMAGE_SUFFIXES else name.with_name(f"{name.name}.jpg")


def _files_of(item: str) -> Iterator[tuple[Path, Path]]:
    path = Path(item)
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            name = file.relative_to(path)
            is_input = file.suffix.lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES
            if is_input and not any(map(is_companion, name.parts)):
                yield file, name
    elif path.is_file():
        yield path, Path(path.name)
    else:
        raise UsageError(f"the input {item!r} does not exist")
