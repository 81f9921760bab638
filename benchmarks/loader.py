"""How fast two views of an unlabeled image are made, against plain Pillow doing the same.

    python -m benchmarks.loader [--images FOLDER_OF_JPEGS]

Both make the views of ``SoftTeacherPolicy`` from the same files with the same random draws, one
after the other, and the pixels that they make are compared. Times are those that one core spent (of
this process, with one thread), so that other programs on the machine count little.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import PIL
import torch
from detectron2.data import transforms as T
from detectron2.data.detection_utils import read_image
from PIL import Image, ImageDraw
from tabulate import tabulate

from benchmarks.plain_pillow import MAX_SIZE, PILLOW_COLOURS, PlainPillow, Stopwatch
from benchmarks.timing import environment
from locreweight.config import load_config
from locreweight.data.image_io import MIN_OVERSAMPLING, SizeLimit, read_for_training
from locreweight.data.mapper import ViewMapper
from locreweight.data.transforms import color_ops as colors
from locreweight.data.transforms.fast_transforms import (
    FastAugInput,
    channels_first,
    resize_bilinear,
)
from locreweight.data.transforms.views import affine_matrix

# (name, height and width of the files, range of the short side of a view)
SETTINGS = [
    ("640x480, short side 320", (480, 640), (320, 320)),
    ("640x480, short side 400-1200", (480, 640), (400, 1200)),
    ("4032x3024, short side 320", (3024, 4032), (320, 320)),
    ("4032x3024, short side 400-1200", (3024, 4032), (400, 1200)),
]
OUR_COLOURS: list[Callable[[np.ndarray, float], np.ndarray]] = [
    lambda image, strength: image,
    lambda image, strength: colors.autocontrast(image),
    lambda image, strength: colors.equalize(image),
    lambda image, strength: colors.solarize(image, int(128 * strength)),
    lambda image, strength: colors.posterize(image, 4 + int(2 * strength)),
    colors.saturation,
    colors.contrast,
    colors.brightness,
    colors.sharpness,
]
COLOUR_NAMES = (
    "none",
    "autocontrast",
    "equalize",
    "solarize",
    "posterize",
    "saturation",
    "contrast",
    "brightness",
    "sharpness",
)
# What each augmentation of the recipe is called in the table.
STAGES = {
    "ResizeShortestEdge": "resize",
    "RandomFlip": "flip",
    "RandomColorOperation": "color",
    "RandomGeometricOperation": "geometry",
    "RandomErasing": "erase",
}


class OursByStage:
    """What ``ViewMapper.unlabeled`` does, with a stopwatch at each augmentation."""

    def __init__(self, mapper: ViewMapper, limit: SizeLimit) -> None:
        self.mapper = mapper
        self.limit = limit

    def two_views(self, file: str, watch: Stopwatch) -> None:
        with watch("decode"):
            source = read_for_training(file, self.limit)
        shared: dict = {}
        for view in (self.mapper.policy.weak, self.mapper.policy.strong):
            given, transforms = FastAugInput(source.pixels, shared), []
            for augmentation in view:
                with watch(STAGES[type(augmentation).__name__]):
                    transforms.append(augmentation(given))
            with watch("to tensor"):
                channels_first(given.image, "BGR")
            with watch("matrix"):
                affine_matrix(source.scaling + T.TransformList(transforms), source.shape)


def seconds(action: Callable[[], object]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


def compare(files: list[str], short_sides: tuple[int, int], rounds: int) -> tuple[list, dict]:
    """The row of the table for one setting, and milliseconds by stage for (who, stage)."""
    options = ["INPUT.MIN_SIZE_TRAIN", str(short_sides), "INPUT.MAX_SIZE_TRAIN", str(MAX_SIZE)]
    options += ["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", "INPUT.REDUCED_DECODING"]
    whole, reduced = (ViewMapper(load_config("", [*options, on])) for on in ("False", "True"))
    plain = PlainPillow(short_sides, whole.policy.strong[-1].fill)
    staged = OursByStage(whole, SizeLimit())
    contestants: dict[str, Callable[[str], object]] = {
        "plain": lambda file: plain.two_views(file, Stopwatch()),
        "ours": lambda file: whole.unlabeled({"file_name": file}),
        "reduced": lambda file: reduced.unlabeled({"file_name": file}),
    }
    times: dict[str, list[float]] = defaultdict(list)
    stages: dict[tuple[str, str], list[float]] = defaultdict(list)
    for turn in range(-1, rounds):  # the first is to warm up
        spent: dict[str, float] = defaultdict(float)
        watches = {"plain": Stopwatch(), "ours": Stopwatch()}
        for number, file in enumerate(files):
            seed = 1000 * (turn + 1) + number
            for name, make in contestants.items():
                np.random.seed(seed)
                spent[name] += seconds(partial(make, file))
            for name, parts in (("plain", plain), ("ours", staged)):
                np.random.seed(seed)
                parts.two_views(file, watches[name])
        if turn >= 0:
            for name in contestants:
                times[name].append(spent[name] / len(files))
            for name, watch in watches.items():
                for stage, milliseconds in watch.milliseconds.items():
                    stages[name, stage].append(milliseconds / len(files))
    row = [1e3 * statistics.median(times["plain"])]
    for name in ("ours", "reduced"):
        faster = [a / b for a, b in zip(times["plain"], times[name], strict=True)]
        row += [1e3 * statistics.median(times[name]), statistics.median(faster)]
    row += [1 / statistics.median(times["reduced"]), difference(files, plain, whole)]
    return row, {key: statistics.median(values) for key, values in stages.items()}


def difference(files: list[str], plain: PlainPillow, ours: ViewMapper) -> float:
    """Mean absolute difference of the pixels of both: they do the same."""
    means = []
    for number, file in enumerate(files):
        np.random.seed(number)
        expected = plain.two_views(file, Stopwatch())
        np.random.seed(number)
        sample = ours.unlabeled({"file_name": file})
        for found, view in zip((sample.weak, sample.strong), expected, strict=True):
            means.append(float((found.image.float() - view.float()).abs().mean()))
    return statistics.mean(means)


def color_rows(image: np.ndarray, rounds: int) -> list[list]:
    """Each color operation: Pillow's from array to array, and ours."""
    rows = []
    for name, pillows, ours in zip(COLOUR_NAMES, PILLOW_COLOURS, OUR_COLOURS, strict=True):
        both: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            given = Image.fromarray(image)
            both[0].append(1e3 * seconds(partial(pillows, given, 1.3)))
            both[1].append(1e3 * seconds(partial(ours, image, 1.3)))
        rows.append([name, *(statistics.median(times) for times in both)])
    return rows


def reduction_rows(files: list[str]) -> list[list]:
    """What decoding at a reduced scale changes in a view, and what other filters would change.

    The least favourable size of view is taken: ``MIN_OVERSAMPLING`` pixels are decoded for one.
    """
    rows = []
    for reduction in (2, 4, 8):
        found: dict[str, list[np.ndarray]] = defaultdict(list)
        for file in files:
            whole = read_image(file, "RGB")
            # Only images that reduce without a remainder.
            if whole.shape[0] % reduction or whole.shape[1] % reduction:
                continue
            height, width = (int(side / reduction / MIN_OVERSAMPLING) for side in whole.shape[:2])
            short, long = min(height, width), max(height, width)
            small = read_for_training(file, SizeLimit(short, long)).pixels
            assert small.shape[0] == whole.shape[0] // reduction
            expected = pillow_resize(whole, height, width, Image.Resampling.BILINEAR)
            others = {
                "reduced decoding": resize_bilinear(small, height, width),
                "bicubic": pillow_resize(whole, height, width, Image.Resampling.BICUBIC),
                "area": cv2.resize(whole, (width, height), interpolation=cv2.INTER_AREA),
                "no smoothing": cv2.resize(whole, (width, height)),
            }
            for name, other in others.items():
                found[name].append(np.abs(other.astype(float) - expected).ravel())
        for name, differences in found.items():
            error = np.concatenate(differences)
            noise = 10 * np.log10(255**2 / np.mean(error**2))
            rows.append([f"1/{reduction}", name, error.mean(), noise])
    return rows


def pillow_resize(image: np.ndarray, height: int, width: int, how: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((width, height), how))


def write_jpegs(folder: Path, size: tuple[int, int], count: int) -> list[str]:
    """Pictures with a natural spectrum, and with shapes that have sharp edges, at quality 90."""
    height, width = size
    draw = np.random.default_rng(0)
    files = []
    for number in range(count):
        # At a quarter of the size, enlarged: photos are smooth from pixel to pixel.
        rows, columns = np.fft.fftfreq(height // 2), np.fft.rfftfreq(width // 2)
        frequency = np.hypot(rows[:, None], columns[None]) + 1 / width
        layers = [
            np.fft.irfft2(np.fft.rfft2(draw.normal(size=(height // 2, width // 2))) / frequency)
            for _ in range(3)
        ]
        # Channels of a photo are much alike.
        values = np.stack([layers[0] + 0.3 * layer for layer in layers], axis=2)
        pixels = np.clip(128 + 45 * values / values.std(), 0, 255).astype(np.uint8)
        image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
        canvas = ImageDraw.Draw(image)
        for _ in range(8):
            x, y = draw.integers(0, width), draw.integers(0, height)
            reach = int(draw.integers(height // 20, height // 4))
            color = tuple(int(value) for value in draw.integers(0, 256, 3))
            shape = canvas.ellipse if draw.integers(2) else canvas.rectangle
            shape((int(x), int(y), int(x) + reach, int(y) + reach), fill=color)
        file = folder / f"{width}x{height}_{number}.jpg"
        image.save(file, quality=90)
        files.append(str(file))
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=Path, help="folder of JPEGs instead of generated ones")
    parser.add_argument("--count", type=int, default=18, help="images of 640x480 (default: 18)")
    parser.add_argument(
        "--rounds", type=int, default=7, help="medians are over so many (default: 7)"
    )
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    print(f"\nloader: {environment()}, Pillow {PIL.__version__}, OpenCV {cv2.__version__}\n")
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), arguments.images, arguments.count, arguments.rounds)


def run(folder: Path, images: Path | None, count: int, rounds: int) -> None:
    rows, by_stage = [], []
    if images:
        own = [str(f) for f in sorted(images.iterdir()) if f.suffix.lower() in (".jpg", ".jpeg")]
        small = own[:: max(1, len(own) // count)][:count]
        print(f"Small images: {len(small)} of {images}; large ones are generated.\n")
    else:
        small = write_jpegs(folder, (480, 640), count)
        print("All images are generated.\n")
    large = write_jpegs(folder, (3024, 4032), max(1, count // 6))
    for name, size, short_sides in SETTINGS:
        row, stages = compare(small if size[0] < 1000 else large, short_sides, rounds)
        rows.append([name, *row])
        by_stage.append(stages)
    print("Two views of an image: milliseconds of one core, and how many times as fast")
    headers = [
        "files, views",
        "Pillow",
        "ours",
        "times",
        "reduced",
        "times",
        "samples/s",
        "differ by",
    ]
    print(tabulate(rows, headers, floatfmt=".2f"))
    for (name, *_), stages in list(zip(SETTINGS, by_stage, strict=True))[:2]:
        order = dict.fromkeys(stage for _, stage in stages)
        table = [[s, stages.get(("plain", s)), stages.get(("ours", s))] for s in order]
        print(f"\nBy stage, in milliseconds, {name}")
        print(tabulate(table, ["stage", "Pillow", "ours"], floatfmt=".2f"))
    image = resize_bilinear(read_image(small[0], "RGB"), 800, 1066)
    print("\nColor operations on 1066x800, in milliseconds")
    print(tabulate(color_rows(image, 5 * rounds), ["operation", "Pillow", "ours"], floatfmt=".2f"))
    print("\nDifference of a view to whole decoding and Pillow's bilinear, in levels of 255")
    for kind, files in (("small", small), ("large", large)):
        print(f"\n{kind} images, {MIN_OVERSAMPLING} decoded pixels for one of the view")
        headers = ["decoded", "what else", "mean", "PSNR, dB"]
        print(tabulate(reduction_rows(files), headers, floatfmt=".2f"))


if __name__ == "__main__":
    main()
