"""Reader of YOLO data sets, in the layout of Ultralytics.

There is a text file for each image, with a line for each object: its class number, and the center,
width and height of its box as fractions of the image. Lines with more numbers are polygons.

The ``supervision`` library reads this format as well. It is not used, because its errors do not
name the file, it ignores EXIF rotation and subfolders, refuses images with a palette or an alpha
channel, and draws a mask of the size of the image for each polygon.
"""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import yaml
from detectron2.structures import BoxMode

from ...errors import UsageError
from ..checks import check_same_classes
from ..image_io import image_size
from .file_names import (
    IMAGE_SUFFIXES,
    ImageFinder,
    is_companion,
    printable_name,
    read_text,
    spelling_key,
)
from .image_folders import image_paths

logger = logging.getLogger(__name__)

YAML_SUFFIXES = (".yaml", ".yml")
_SPLIT_KEYS = {"val": ("val", "valid", "validation"), "valid": ("valid", "val", "validation")}
_TOLERANCE = 0.01  # by which fractions may leave [0, 1], for rounding
_CLASS_FILES = ("classes.txt", "obj.names")  # labelImg and Label Studio; CVAT
_KEYPOINT_KEY = "kpt_shape"


@dataclass(frozen=True)
class YoloSource:
    """Where the images of a data set are, and what their classes are.

    Attributes:
        root: folder that image ids are relative to.
        images: image files.
        label_files: the label file of each image, which need not exist.
        class_names: in the order of their numbers.
        origin: the file or setting that names the classes, for messages.
        has_keypoints: lines have keypoints behind the box.
        class_file, listed_names: file beside the labels that lists class names, and the names;
            empty if there is none.
    """

    root: str
    images: list[str]
    label_files: list[str]
    class_names: list[str]
    origin: str
    has_keypoints: bool = False
    class_file: str = ""
    listed_names: list[str] = field(default_factory=list)


def open_yaml(
    yaml_file: str, split: str, class_names: Sequence[str], *, allow_outside: bool = False
) -> YoloSource:
    """Read ``data.yaml`` and list the images of a split.

    Args:
        yaml_file: with ``names``, and ``train``, ``val`` or ``test``: a folder, a text file that
            lists images, or several of them; relative to ``path`` and the file's folder.
        split: key of the images.
        class_names: ``DATASETS.CLASS_NAMES``, for files without ``names``.
        allow_outside: text files may list images outside of their folder.

    Raises:
        UsageError: if the file is malformed, or lacks the split.
    """
    content = _read_yaml(yaml_file)
    own_names = _class_names(yaml_file, content.get("names"))
    names = own_names or list(class_names)
    if not names:
        raise UsageError(f"{yaml_file} has no names of classes: add `names:`")
    count = content.get("nc") or len(names)
    if str(count) != str(len(names)):
        origin = "`names`" if own_names else "DATASETS.CLASS_NAMES"
        raise UsageError(
            f"{yaml_file} has `nc: {count}` classes, but {origin} has {len(names)}: "
            f"{', '.join(names[:5])}. Correct `nc` or {origin}"
        )
    folder = os.path.dirname(os.path.abspath(yaml_file))
    images: list[str] = []
    for entry in _entries(yaml_file, content, split):
        place = _resolve(yaml_file, content, folder, entry)
        if os.path.isdir(place):
            images += sorted(image_paths(place))
        else:
            images += _listed_images(place, folder, allow_outside)
    if not images:
        raise UsageError(f"there is no image in {split!r} of {yaml_file}")
    repeated = [image for image, count in Counter(images).items() if count > 1]
    if repeated:
        name = printable_name(repeated[0])
        raise UsageError(f"{split!r} of {yaml_file} has the image {name} more than once")
    labels = [_label_file(image) for image in images]
    has_keypoints = _KEYPOINT_KEY in content
    return YoloSource(folder, images, labels, names, f"`names` in {yaml_file}", has_keypoints)


def open_folders(images: str, labels: str, class_names: Sequence[str]) -> YoloSource:
    """List the images of a folder whose label files are in another folder, or the same.

    Args:
        images: the image folder. Subfolders are the same as those of the label folder.
        labels: the label folder.
        class_names: ``DATASETS.CLASS_NAMES``. If it is empty, they are read from ``classes.txt`` or
            ``obj.names`` in the label folder or the folder above it. If not, they can be other
            names than those of the file, but not the same in another order.

    Raises:
        UsageError: if there are no images or no class names.
    """
    try:
        class_file, listed = _listed_class_names(labels)
    except UsageError:
        if not class_names:
            raise
        class_file, listed = "", []  # not needed
    names, origin = list(class_names), "DATASETS.CLASS_NAMES"
    if not names:
        names, origin = listed, class_file
    if not names:
        raise UsageError(
            f"the classes of the labels in {labels} have no names: set DATASETS.CLASS_NAMES, or "
            "put them into classes.txt beside the labels, one in each line"
        )
    files = sorted(image_paths(images))
    if not files:
        raise UsageError(f"no image ({' '.join(sorted(IMAGE_SUFFIXES))}) in the folder {images}")
    relative = [os.path.splitext(os.path.relpath(file, images))[0] + ".txt" for file in files]
    label_files = [os.path.join(labels, file) for file in relative]
    return YoloSource(
        images, files, label_files, names, origin, class_file=class_file, listed_names=listed
    )


def _listed_class_names(labels: str) -> tuple[str, list[str]]:
    """File that lists class names in the label folder or the one above it, and the names.

    Raises:
        UsageError: if the file cannot be read.
    """
    above = os.path.dirname(os.path.abspath(labels))
    for file in [os.path.join(place, name) for place in (labels, above) for name in _CLASS_FILES]:
        if os.path.isfile(file):
            try:
                lines = read_text(file).splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise UsageError(f"cannot read {printable_name(file)}: {error}") from error
            if names := [line.strip() for line in lines if line.strip()]:
                return file, names
    return "", []


def load_yolo(source: YoloSource) -> list[dict]:
    """Read the labels of images. Images without a label file, or with an empty one, have no object.

    Returns:
        records in Detectron2's standard format, in the order of the images, with the path relative
        to ``source.root`` as ``image_id``. Boxes are xyxy in absolute pixels of the original image.

    Raises:
        UsageError: if a label file is malformed or that of two images, an image cannot be read, no
            image has a label file, or ``classes.txt`` has the given classes in another order.
    """
    if Counter(source.listed_names) == Counter(source.class_names):
        # Without the file, or with other names in it, the given names are right.
        check_same_classes(
            {source.origin: source.class_names, source.class_file: source.listed_names}
        )
    files = _find_label_files(source)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        sizes = list(threads.map(image_size, source.images))
    read = partial(_read_labels, source)
    return [
        {
            "file_name": image,
            "image_id": os.path.relpath(image, source.root),
            "width": width,
            "height": height,
            "annotations": read(file, width, height) if file else [],
        }
        for image, file, (width, height) in zip(source.images, files, sizes, strict=True)
    ]


# -- data.yaml -------------------------------------------------------------------------------------


def _read_yaml(file: str) -> dict[str, Any]:
    try:
        # All scalars stay texts: the class "no" would become False otherwise.
        content = yaml.load(read_text(file), Loader=yaml.BaseLoader)
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} is not yaml: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(
            f"{file} is not a YOLO data set: it has no keys such as `train` and `names`"
        )
    return content


def _class_names(file: str, names: Any) -> list[str]:
    """Class names of a list, or of a mapping from numbers to names."""
    if isinstance(names, dict):
        numbers = [str(i) for i in range(len(names))]
        if set(names) != set(numbers):
            raise UsageError(
                f"the classes in `names` of {file} must be numbered from 0 to {len(names) - 1}, "
                f"not {', '.join(names)}"
            )
        names = [names[number] for number in numbers]
    if names is None or names == "":
        return []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UsageError(
            f"`names` of {file} is neither a list of class names nor a mapping to them"
        )
    return names


def _entries(file: str, content: dict[str, Any], split: str) -> list[str]:
    keys = _SPLIT_KEYS.get(split, (split,))
    found = next((content[key] for key in keys if content.get(key)), None)
    entries = [found] if isinstance(found, str) else found
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        known = [key for key in ("train", "val", "valid", "test") if content.get(key)]
        raise UsageError(
            f"{file} has no images under {split!r}. It has {', '.join(known) or 'no split'}: name "
            f"one as yolo:{file}:<split>"
        )
    return entries


def _resolve(yaml_file: str, content: dict[str, Any], folder: str, entry: str) -> str:
    """The folder or list that an entry names.

    ``path`` is relative to the yaml file or the working folder, where Ultralytics has it below its
    own folder of data sets. Exports of Roboflow have ``../`` in front of folders beside the file.
    """
    entry = entry.replace("\\", "/")
    path = content.get("path") if isinstance(content.get("path"), str) else ""
    path = os.path.expanduser((path or "").replace("\\", "/"))
    bases = [os.path.join(folder, path), os.path.abspath(path), folder]
    tried = [os.path.normpath(os.path.join(base, entry)) for base in dict.fromkeys(bases)]
    if entry.startswith("../"):
        tried.append(os.path.join(folder, entry.removeprefix("../")))
    for place in tried:
        if os.path.exists(place):
            return place
    raise UsageError(
        f"{entry!r} in {yaml_file} does not exist: looked for {', '.join(dict.fromkeys(tried))}. "
        "Correct `path` or the entry"
    )


def _listed_images(list_file: str, folder: str, allow_outside: bool) -> list[str]:
    """Images that a text file lists, relative to its folder or to that of the yaml file."""
    try:
        names = [line.strip() for line in read_text(list_file).splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{list_file} is not a list of images: {error}") from error
    names = [name for name in names if not is_companion(os.path.basename(name))]
    own = os.path.dirname(list_file)
    is_own = any(os.path.lexists(os.path.join(own, name)) for name in names[:100])
    finder = ImageFinder(list_file, own if is_own else folder, allow_outside=allow_outside)
    return [os.path.normpath(path) for path in finder.find_all(names)]


def _label_file(image: str) -> str:
    """The label file of an image: in ``labels`` instead of the last folder ``images``, if any."""
    parts = image.split(os.sep)
    for i in reversed(range(len(parts) - 1)):
        if parts[i] == "images":
            parts[i] = "labels"
            break
    return os.path.splitext(os.sep.join(parts))[0] + ".txt"


# -- labels ----------------------------------------------------------------------------------------


@dataclass
class _LabelFolder:
    """The label files of a folder, which is listed once.

    Attributes:
        names: the files.
        similar: by :func:`.spelling_key`.
        used: the files that were found.
    """

    names: set[str] = field(default_factory=set)
    similar: dict[str, list[str]] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, folder: str) -> _LabelFolder:
        try:
            names = os.listdir(folder)
        except OSError:
            return cls()
        found = cls({name for name in names if name.endswith(".txt") and not is_companion(name)})
        for name in found.names:
            found.similar.setdefault(spelling_key(name), []).append(name)
        return found

    def find(self, name: str) -> str:
        """The name on the disk; empty if there is none."""
        similar = [name] if name in self.names else self.similar.get(spelling_key(name), [])
        if len(similar) != 1:
            return ""
        self.used.add(similar[0])
        return similar[0]

    def unused(self) -> list[str]:
        return sorted(self.names - self.used - {*_CLASS_FILES, "README.txt"})


def _find_label_files(source: YoloSource) -> list[str]:
    """The existing label file of each image; empty if there is none."""
    folders: dict[str, _LabelFolder] = {}
    found = []
    image_of: dict[str, str] = {}
    for image, file in zip(source.images, source.label_files, strict=True):
        parent, name = os.path.split(file)
        if parent not in folders:
            folders[parent] = _LabelFolder.of(parent)
        existing = folders[parent].find(name)
        path = os.path.join(parent, existing) if existing else ""
        other = image_of.setdefault(path, image) if path else image
        if other != image:
            raise UsageError(
                f"{printable_name(other)} and {printable_name(image)} have the same label file, "
                f"{printable_name(path)}: rename one of the images and give it its own labels"
            )
        found.append(path)
    missing = [image for image, file in zip(source.images, found, strict=True) if not file]
    if len(missing) == len(found):
        raise UsageError(
            f"none of {len(found)} images of {source.root} has a label file, such as "
            f"{printable_name(source.label_files[0])} of {printable_name(source.images[0])}"
        )
    if missing:
        logger.info(
            "%d of %d images of %s have no label file, so no objects, such as %s",
            len(missing),
            len(found),
            source.root,
            printable_name(missing[0]),
        )
    unused = [os.path.join(parent, name) for parent in folders for name in folders[parent].unused()]
    if missing and unused:
        logger.warning(
            "%d label files beside those of %s are of no image, such as %s",
            len(unused),
            source.root,
            printable_name(unused[0]),
        )
    return found


def _read_labels(source: YoloSource, file: str, width: int, height: int) -> list[dict]:
    annotations = []
    try:
        lines = read_text(file).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"the label file {printable_name(file)} cannot be read: {error}"
        ) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            category_id, box = _parse_line(line, source)
        except ValueError as error:
            raise UsageError(
                f"line {number} of {printable_name(file)}, {line!r:.100}: {error}"
            ) from error
        x1, y1, x2, y2 = box
        annotations.append(
            {
                "category_id": category_id,
                "bbox": [x1 * width, y1 * height, x2 * width, y2 * height],
                "bbox_mode": BoxMode.XYXY_ABS,
                "iscrowd": 0,
            }
        )
    return annotations


def _parse_line(line: str, source: YoloSource) -> tuple[int, tuple[float, float, float, float]]:
    """Class number, and box as xyxy in fractions of the image."""
    number, *values = map(float, line.split())
    if source.has_keypoints:
        values = values[:4]
    is_box = len(values) == 4
    if not is_box and (len(values) < 6 or len(values) % 2):
        raise ValueError(
            "it must have a class number and 4 numbers of a box, or 3 or more points of a polygon"
        )
    if not 0 <= number < len(source.class_names) or number != int(number):
        raise ValueError(
            f"there is no class {number:g} among {len(source.class_names)} of {source.origin}: "
            f"{', '.join(source.class_names[:5])}"
        )
    if not all(-_TOLERANCE <= value <= 1 + _TOLERANCE for value in values):
        raise ValueError(
            "coordinates must be fractions of the image, between 0 and 1, not pixels or missing"
        )
    if is_box:
        x, y, box_width, box_height = values
        corners = x - box_width / 2, y - box_height / 2, x + box_width / 2, y + box_height / 2
    else:
        xs, ys = values[::2], values[1::2]
        corners = min(xs), min(ys), max(xs), max(ys)
    assert all(map(math.isfinite, corners))
    return int(number), corners
