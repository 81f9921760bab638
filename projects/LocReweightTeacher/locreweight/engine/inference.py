"""Images that tools are given on the command line, and what a detector finds in them."""

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
from .predictor import Predictor

VIDEO_SUFFIXES = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm"}
INPUT_HELP = "images, folders of them, patterns ('data/*.jpg'), or - for paths on standard input"


@dataclass(frozen=True)
class InputFile:
    """A file to look at, and the name that its picture gets in the output folder."""

    path: Path
    name: Path

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEO_SUFFIXES


@dataclass(frozen=True)
class ImageDetections:
    """An image, ``(H, W, 3)`` uint8 RGB, and the detections in it, in its own pixels."""

    file: InputFile
    image: np.ndarray
    found: Instances


def find_inputs(inputs: Sequence[str], output: Path | None = None) -> list[InputFile]:
    """All files that the command line means, in order.

    Pictures of a folder's images keep their place in it, others the name of their file; where two
    would get the same name the later one is numbered.

    Args:
        inputs: as in :data:`INPUT_HELP`.
        output: where pictures will be written; files in it are results of before, not inputs.

    Raises:
        UsageError: for an input that is not there, or if none is left.
    """
    named: dict[Path, InputFile] = {}
    for given in _expanded(inputs):
        for path, name in _files_of(given):
            if output is not None and output.resolve() in path.resolve().parents:
                continue
            free, number = _name_of_picture(name), 2
            while free in named:
                free = free.with_name(f"{name.stem}-{number}{free.suffix}")
                number += 1
            named[free] = InputFile(path, free)
    if not named:
        own = f"; what lies in the output folder {output} does not count" if output else ""
        raise UsageError(f"there is no image in {' '.join(inputs)}{own}")
    return list(named.values())


def picture_file(given: str) -> Path:
    """A file that a picture can be written to, of the command line: argparse tells of others."""
    if Path(given).suffix.lower() not in IMAGE_SUFFIXES:
        raise argparse.ArgumentTypeError(f"{given} is no name of a picture: name a .jpg or .png")
    return Path(given)


def detect_in_files(
    detector: Predictor, files: Sequence[InputFile], batch: int, unreadable: list[str]
) -> Iterator[ImageDetections]:
    """What a detector finds in image files, with a progress bar on a terminal.

    Args:
        detector: a trained one.
        files: no videos.
        batch: so many images go through the model at a time.
        unreadable: gets a line for each file that is no image; these are left out.
    """
    readable = _readable(tqdm(files, desc="images", disable=None), unreadable)
    for group in _groups(readable, batch):
        found = detector.detect([image for _, image in group])
        for (file, image), detections in zip(group, found, strict=True):
            yield ImageDetections(file, image, detections)


def exit_if_unreadable(unreadable: Sequence[str], count: int) -> None:
    """Ends the process with code 1, naming the files that could not be read, if there are any."""
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


def _groups(
    items: Iterable[tuple[InputFile, np.ndarray]], size: int
) -> Iterator[list[tuple[InputFile, np.ndarray]]]:
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group


def _expanded(inputs: Sequence[str]) -> Iterator[str]:
    for given in inputs:
        if given == "-":
            yield from (line.strip() for line in sys.stdin if line.strip())
        elif Path(given).exists() or not glob.has_magic(given):
            yield given
        else:
            matches = sorted(glob.glob(given, recursive=True))
            if not matches:
                raise UsageError(f"nothing matches {given!r}")
            yield from matches


def _name_of_picture(name: Path) -> Path:
    """Of videos an .mp4; a .jpg of images whose names do not say what they are."""
    suffix = name.suffix.lower()
    if suffix in VIDEO_SUFFIXES:
        return name.with_suffix(".mp4")
    return name if suffix in IMAGE_SUFFIXES else name.with_name(f"{name.name}.jpg")


def _files_of(given: str) -> Iterator[tuple[Path, Path]]:
    path = Path(given)
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            name = file.relative_to(path)
            is_input = file.suffix.lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES
            if is_input and not any(map(is_companion, name.parts)):
                yield file, name
    elif path.is_file():
        yield path, Path(path.name)
    else:
        raise UsageError(f"the input {given!r} does not exist")
