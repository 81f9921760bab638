"""Images, videos and streams named on the command line, and detection in all of them."""

from __future__ import annotations

import argparse
import glob
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from urllib.parse import urlsplit

import cv2
import numpy as np
from tqdm import tqdm

from ..data.datasets.file_names import is_companion
from ..data.datasets.image_folders import IMAGE_SUFFIXES, image_paths
from ..data.image_io import UnreadableImage, read_rgb
from ..errors import UsageError
from ..run_files import is_run_folder
from ..visualization.drawing import DrawingStyle, LabelDetail
from .detections import Detections
from .predictor import Predictor

VIDEO_SUFFIXES = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm"}
STREAM_HELP = "videos, the number of a camera (0), or the address of a stream (rtsp://...)"
INPUT_HELP = "images, folders of them, patterns ('data/*.jpg'), or - for paths on standard input"


DEFAULT_FRAME_RATE = 25.0  # frames per second, for videos and cameras that do not report it
MAX_FRAME_RATE = 1000.0  # some network cameras report the 90000 ticks of their clock instead


@dataclass(frozen=True)
class InputFile:
    """An input file or stream.

    Attributes:
        path: the file; for a stream, only its name.
        name: name of its picture, relative to the output folder.
        stream: number of a camera or address of a stream; empty for files.
    """

    path: Path
    name: Path
    stream: str = ""

    @property
    def is_video(self) -> bool:
        """Whether the input has several frames."""
        return bool(self.stream) or self.path.suffix.lower() in VIDEO_SUFFIXES

    def __str__(self) -> str:
        """The path, or the address of the stream without user name and password."""
        start, separator, rest = self.stream.partition("://")
        host, slash, path = rest.partition("/")
        return start + separator + host.rpartition("@")[2] + slash + path or str(self.path)


@dataclass(frozen=True)
class Frame:
    """An image file, or one frame of a video or stream.

    Attributes:
        file: the input that it belongs to.
        index: number of the frame, from 0; None for image files.
        rate: frames per second of the video; 0 for image files.
    """

    file: InputFile
    index: int | None = None
    rate: float = 0.0


def find_inputs(inputs: Sequence[str], outputs: Sequence[Path] = ()) -> list[InputFile]:
    """Find all input files and streams, in order.

    Folders are searched as ``folder:`` data sets are: links are followed, and hidden files and
    folders of runs are left out. The picture of an image in an input folder gets the image's path
    relative to that folder, other pictures get the name of their image. If a name is already used,
    a number is added.

    Args:
        inputs: see :data:`INPUT_HELP` and :data:`STREAM_HELP`.
        outputs: folders for pictures; files in them are results of earlier calls and are ignored.

    Raises:
        UsageError: if an input does not exist, or there is no input left.
    """
    named: dict[Path, InputFile] = {}
    ignored = {output.resolve() for output in outputs}
    for item in _expand(inputs):
        is_stream = _is_stream(item)
        for path, name in [(Path(item), _stream_name(item))] if is_stream else _files_of(item):
            if ignored and not ignored.isdisjoint(path.resolve().parents):
                continue
            picture, number = _picture_name(name), 2
            while picture in named:
                picture = picture.with_name(f"{name.stem}-{number}{picture.suffix}")
                number += 1
            named[picture] = InputFile(path, picture, item if is_stream else "")
    if not named:
        folders = " ".join(map(str, outputs))
        note = f" (files in the output folder {folders} are ignored)" if outputs else ""
        raise UsageError(f"there is no image in {' '.join(inputs)}{note}")
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
    detector: Predictor,
    files: Sequence[InputFile],
    batch: int | None,
    unreadable: list[str],
    max_frames: int | None = None,
) -> Iterator[tuple[Frame, Detections]]:
    """Detect objects in images, videos and streams, with progress bars on terminals.

    Args:
        detector: the predictor.
        files: the inputs. Images come first, in batches, and then each video.
        batch: batch size; None for the predictor's default.
        unreadable: a message is appended for each input that cannot be read; it is skipped.
        max_frames: largest number of frames of each video or stream.

    Yields:
        each image or frame with its detections, whatever their score.
    """
    images = [file for file in files if not file.is_video]
    if images:
        yield from detector.detect_each(read_images(images, unreadable), batch)
    for file in (file for file in files if file.is_video):
        yield from detector.detect_each(_read_video(file, unreadable, max_frames), batch)


def exit_if_unreadable(unreadable: Sequence[str], count: int) -> None:
    """If inputs could not be read, name them and exit with code 1."""
    if unreadable:
        for line in unreadable:
            print(f"skipped: {line}", file=sys.stderr)
        sys.exit(f"error: {len(unreadable)} of {count} inputs could not be read")


def read_images(
    files: Iterable[InputFile], unreadable: list[str]
) -> Iterator[tuple[Frame, np.ndarray]]:
    """Yield images ``(H, W, 3)`` uint8 RGB, with a progress bar on terminals.

    Args:
        files: image files.
        unreadable: a message is appended for each file that cannot be read; it is skipped.
    """
    for file in tqdm(files, desc="images", disable=None):
        try:
            yield Frame(file), read_rgb(str(file.path))
        except UnreadableImage as error:
            unreadable.append(str(error))


def _read_video(
    file: InputFile, unreadable: list[str], max_frames: int | None
) -> Iterator[tuple[Frame, np.ndarray]]:
    video = cv2.VideoCapture(
        int(file.stream) if file.stream.isdigit() else file.stream or str(file.path)
    )
    try:
        total = max(int(video.get(cv2.CAP_PROP_FRAME_COUNT)), 0) or None
        if max_frames:
            total = min(total or max_frames, max_frames)
        rate = video.get(cv2.CAP_PROP_FPS)
        if not 0 < rate <= MAX_FRAME_RATE:
            rate = DEFAULT_FRAME_RATE
        frames = tqdm(_frames(video), desc=file.name.name, total=total, disable=None)
        count = 0
        for count, image in enumerate(islice(frames, max_frames), start=1):
            yield Frame(file, count - 1, rate), image
        if not count:
            kind = "stream" if file.stream else "video"
            camera = "camera " if file.stream.isdigit() else ""
            unreadable.append(f"{camera}{file}: no frame of the {kind} can be read")
    finally:
        video.release()


def _frames(video: cv2.VideoCapture) -> Iterator[np.ndarray]:
    """Yield all frames, ``(H, W, 3)`` uint8 RGB."""
    while True:
        success, frame = video.read()
        if not success:
            return
        yield np.ascontiguousarray(frame[:, :, ::-1])


def _is_stream(item: str) -> bool:
    return ("://" in item or item.isdigit()) and not Path(item).exists()


def _stream_name(item: str) -> Path:
    """Name of the video that is written for a camera or an address."""
    if item.isdigit():
        return Path(f"camera-{item}.mp4")
    address = urlsplit(item)
    return Path(f"{Path(address.path).stem or address.hostname or 'stream'}.mp4")


def _expand(inputs: Sequence[str]) -> Iterator[str]:
    for item in inputs:
        if item == "-":
            yield from (line.strip() for line in sys.stdin if line.strip())
        elif _is_stream(item) or Path(item).exists() or not glob.has_magic(item):
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
        for file in sorted(map(Path, [*image_paths(item), *_video_paths(item)])):
            yield file, file.relative_to(path)
    elif path.is_file():
        yield path, Path(path.name)
    else:
        raise UsageError(f"the input {item!r} does not exist")


def _video_paths(folder: str) -> Iterator[str]:
    """Yield the videos in a folder. The same subfolders are searched as by :func:`image_paths`."""
    visited = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited or (parent != folder and is_run_folder(names)):
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not is_companion(name))
        for name in names:
            path = os.path.join(parent, name)
            # Reading a pipe would never end. A broken link counts as a video that is missing.
            is_file = os.path.isfile(path) or not os.path.exists(path)
            is_video = os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES
            if is_video and is_file and not is_companion(name):
                yield path
