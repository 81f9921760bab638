#!/usr/bin/env python
"""Speed of making two views of an unlabeled image, compared with doing the same with Pillow alone.

    python -m benchmarks.loader [--images FOLDER_OF_JPEGS]

Both make the views of ``SoftTeacherPolicy`` from the same files with the same random draws, and the
resulting pixels are compared. Times are CPU times of one thread in this process, so other programs
on the machine have little influence.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import PIL
import torch
from detectron2.data import transforms as T
from detectron2.data.detection_utils import read_image
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from tabulate import tabulate

from benchmarks.timing import environment
from locreweight.command_line import HelpFormatter
from locreweight.config import load_config
from locreweight.data.image_io import MIN_OVERSAMPLING, SizeLimit, read_for_training
from locreweight.data.mapper import ViewMapper
from locreweight.data.transforms import color_ops
from locreweight.data.transforms.augmentations import RandomErasing, RandomGeometricOperation
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
MAX_SIZE = 1333  # of a view's long side

PillowOperation = Callable[[Image.Image, float], Image.Image]
ArrayOperation = Callable[[np.ndarray, float], np.ndarray]
# The color operations of RandomColorOperation, in its order: by Pillow and by this project.
COLOR_OPERATIONS: dict[str, tuple[PillowOperation, ArrayOperation]] = {
    "none": (lambda image, _: image, lambda image, _: image),
    "autocontrast": (
        lambda image, _: ImageOps.autocontrast(image),
        lambda image, _: color_ops.autocontrast(image),
    ),
    "equalize": (
        lambda image, _: ImageOps.equalize(image),
        lambda image, _: color_ops.equalize(image),
    ),
    "solarize": (
        lambda image, strength: ImageOps.solarize(image, int(128 * strength)),
        lambda image, strength: color_ops.solarize(image, int(128 * strength)),
    ),
    "posterize": (
        lambda image, strength: ImageOps.posterize(image, 4 + int(2 * strength)),
        lambda image, strength: color_ops.posterize(image, 4 + int(2 * strength)),
    ),
    "saturation": (
        lambda image, strength: ImageEnhance.Color(image).enhance(strength),
        color_ops.saturation,
    ),
    "contrast": (
        lambda image, strength: ImageEnhance.Contrast(image).enhance(strength),
        color_ops.contrast,
    ),
    "brightness": (
        lambda image, strength: ImageEnhance.Brightness(image).enhance(strength),
        color_ops.brightness,
    ),
    "sharpness": (
        lambda image, strength: ImageEnhance.Sharpness(image).enhance(strength),
        color_ops.sharpness,
    ),
}
STAGES = {  # names of the policy's augmentations in the table
    "ResizeShortestEdge": "resize",
    "RandomFlip": "flip",
    "RandomColorOperation": "color",
    "RandomGeometricOperation": "geometry",
    "RandomErasing": "erase",
}


class StageTimer:
    """Sum up the CPU time of each stage, in milliseconds."""

    def __init__(self) -> None:
        self.milliseconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.milliseconds[stage] += 1e3 * (time.process_time() - start)


class PillowMapper:
    """The reference: decode an image once and do every operation with Pillow."""

    def __init__(self, short_sides: tuple[int, int], fill: tuple[float, float, float]) -> None:
        self.short_sides = short_sides
        self.fill = fill
        self.geometry = RandomGeometricOperation(fill)
        self.erasing = RandomErasing(fill)

    def make_views(self, file: str, timer: StageTimer) -> list[torch.Tensor]:
        """Make the weak and the strong view, ``(3, H, W)`` uint8 BGR."""
        with timer("decode"):
            image = Image.open(file).convert("RGB")
        views = []
        for is_strong in (False, True):
            view = self._resize_and_flip(image, timer)
            if is_strong:
                view = self._augment_strongly(view, timer)
            with timer("to tensor"):
                pixels = np.asarray(view)[:, :, ::-1].transpose(2, 0, 1)
                views.append(torch.from_numpy(pixels.copy()))
        return views

    def _resize_and_flip(self, image: Image.Image, timer: StageTimer) -> Image.Image:
        with timer("resize"):
            side = np.random.randint(self.short_sides[0], self.short_sides[1] + 1)
            shape = T.ResizeShortestEdge.get_output_shape(image.height, image.width, side, MAX_SIZE)
            image = image.resize(shape[::-1], Image.Resampling.BILINEAR)
        with timer("flip"):
            return ImageOps.mirror(image) if np.random.uniform() < 0.5 else image

    def _augment_strongly(self, image: Image.Image, timer: StageTimer) -> Image.Image:
        size = np.empty((image.height, image.width, 0))  # both augmentations use the shape only
        fill = tuple(round(value) for value in self.fill)
        operations = [pillow for pillow, _ in COLOR_OPERATIONS.values()]
        with timer("color"):
            strength = np.random.uniform(0.1, 1.9)
            image = operations[np.random.randint(len(operations))](image, strength)
        with timer("geometry"):
            inverse = np.linalg.inv(self.geometry.get_transform(size).matrix)[:2].ravel().tolist()
            bilinear, affine = Image.Resampling.BILINEAR, Image.Transform.AFFINE
            image = image.transform(image.size, affine, inverse, bilinear, fillcolor=fill)
        with timer("erase"):
            draw = ImageDraw.Draw(image)
            for x1, y1, x2, y2 in self.erasing.get_transform(size).patches:
                if x2 > x1 and y2 > y1:
                    draw.rectangle((x1, y1, x2 - 1, y2 - 1), fill)
        return image


class TimedViewMapper:
    """The steps of ``ViewMapper.unlabeled``, with a timer for each."""

    def __init__(self, mapper: ViewMapper, limit: SizeLimit) -> None:
        self.mapper = mapper
        self.limit = limit

    def make_views(self, file: str, timer: StageTimer) -> None:
        with timer("decode"):
            source = read_for_training(file, self.limit)
        resize_cache: dict = {}
        for view in (self.mapper.policy.weak, self.mapper.policy.strong):
            augmented, transforms = FastAugInput(source.pixels, resize_cache), []
            for augmentation in view:
                with timer(STAGES[type(augmentation).__name__]):
                    transforms.append(augmentation(augmented))
            with timer("to tensor"):
                channels_first(augmented.image, "BGR")
            with timer("matrix"):
                affine_matrix(source.scaling + T.TransformList(transforms), source.shape)


def cpu_seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def compare(
    files: list[str], short_sides: tuple[int, int], rounds: int
) -> tuple[list[float], dict[tuple[str, str], float]]:
    """Return a setting's row of the table, and the milliseconds for each (mapper, stage)."""
    options = ["INPUT.MIN_SIZE_TRAIN", str(short_sides), "INPUT.MAX_SIZE_TRAIN", str(MAX_SIZE)]
    options += ["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", "INPUT.REDUCED_DECODING"]
    full, reduced = (ViewMapper(load_config("", [*options, on])) for on in ("False", "True"))
    pillow = PillowMapper(short_sides, full.policy.strong[-1].fill)
    timed = TimedViewMapper(full, SizeLimit())
    functions: dict[str, Callable[[str], object]] = {
        "pillow": lambda file: pillow.make_views(file, StageTimer()),
        "ours": lambda file: full.unlabeled({"file_name": file}),
        "reduced": lambda file: reduced.unlabeled({"file_name": file}),
    }
    seconds: dict[str, list[float]] = defaultdict(list)
    stages: dict[tuple[str, str], list[float]] = defaultdict(list)
    for round_number in range(-1, rounds):  # round -1 is a warm-up
        totals: dict[str, float] = defaultdict(float)
        timers = {"pillow": StageTimer(), "ours": StageTimer()}
        for number, file in enumerate(files):
            seed = 1000 * (round_number + 1) + number
            for name, make_views in functions.items():
                np.random.seed(seed)
                totals[name] += cpu_seconds(partial(make_views, file))
            for name, mapper in (("pillow", pillow), ("ours", timed)):
                np.random.seed(seed)
                mapper.make_views(file, timers[name])
        if round_number >= 0:
            for name in functions:
                seconds[name].append(totals[name] / len(files))
            for name, timer in timers.items():
                for stage, milliseconds in timer.milliseconds.items():
                    stages[name, stage].append(milliseconds / len(files))
    row = [1e3 * statistics.median(seconds["pillow"])]
    for name in ("ours", "reduced"):
        speedups = [a / b for a, b in zip(seconds["pillow"], seconds[name], strict=True)]
        row += [1e3 * statistics.median(seconds[name]), statistics.median(speedups)]
    row += [1 / statistics.median(seconds["reduced"]), mean_difference(files, pillow, full)]
    return row, {key: statistics.median(values) for key, values in stages.items()}


def mean_difference(files: list[str], pillow: PillowMapper, ours: ViewMapper) -> float:
    """Return the mean absolute difference of the pixels of both mappers."""
    means = []
    for number, file in enumerate(files):
        np.random.seed(number)
        expected = pillow.make_views(file, StageTimer())
        np.random.seed(number)
        sample = ours.unlabeled({"file_name": file})
        for view, image in zip((sample.weak, sample.strong), expected, strict=True):
            means.append(float((view.image.float() - image.float()).abs().mean()))
    return statistics.mean(means)


def color_rows(image: np.ndarray, rounds: int) -> list[list]:
    """Measure each color operation from array to array, by Pillow and ours."""
    rows = []
    for name, (pillow, ours) in COLOR_OPERATIONS.items():
        operations: list[ArrayOperation] = [partial(apply_pillow, pillow), ours]
        milliseconds: list[list[float]] = [[], []]
        for _ in range(rounds):
            for times, operation in zip(milliseconds, operations, strict=True):
                times.append(1e3 * cpu_seconds(partial(operation, image, 1.3)))
        rows.append([name, *(statistics.median(times) for times in milliseconds)])
    return rows


def apply_pillow(operation: PillowOperation, image: np.ndarray, strength: float) -> np.ndarray:
    return np.asarray(operation(Image.fromarray(image), strength))


def reduced_decoding_rows(files: list[str]) -> list[list]:
    """Measure how much reduced decoding changes a view, and how much other resize filters would.

    The views have the worst size for it: there are only ``MIN_OVERSAMPLING`` decoded pixels for
    each pixel of the view, across and down.
    """
    rows = []
    for reduction in (2, 4, 8):
        errors: dict[str, list[np.ndarray]] = defaultdict(list)
        for file in files:
            full = read_image(file, "RGB")
            if full.shape[0] % reduction or full.shape[1] % reduction:
                continue  # is always decoded at full size
            height, width = (int(side / reduction / MIN_OVERSAMPLING) for side in full.shape[:2])
            limit = SizeLimit(min(height, width), max(height, width))
            small = read_for_training(file, limit).pixels
            assert small.shape[0] == full.shape[0] // reduction
            expected = pillow_resize(full, height, width, Image.Resampling.BILINEAR)
            for name, other in {
                "reduced decoding": resize_bilinear(small, height, width),
                "bicubic": pillow_resize(full, height, width, Image.Resampling.BICUBIC),
                "area": cv2.resize(full, (width, height), interpolation=cv2.INTER_AREA),
                "no antialiasing": cv2.resize(full, (width, height)),
            }.items():
                errors[name].append(np.abs(other.astype(float) - expected).ravel())
        for name, parts in errors.items():
            error = np.concatenate(parts)
            psnr = 10 * np.log10(255**2 / np.mean(error**2))
            rows.append([f"1/{reduction}", name, error.mean(), psnr])
    return rows


def pillow_resize(
    image: np.ndarray, height: int, width: int, resampling: Image.Resampling
) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((width, height), resampling))


def write_jpegs(folder: Path, size: tuple[int, int], count: int) -> list[str]:
    """Write JPEGs of quality 90 with the spectrum of photos and shapes with sharp edges."""
    height, width = size
    rng = np.random.default_rng(0)
    files = []
    for number in range(count):
        # Made at half the size and enlarged, since photos are smooth from pixel to pixel.
        rows, columns = np.fft.fftfreq(height // 2), np.fft.rfftfreq(width // 2)
        frequency = np.hypot(rows[:, None], columns[None]) + 1 / width
        layers = [
            np.fft.irfft2(np.fft.rfft2(rng.normal(size=(height // 2, width // 2))) / frequency)
            for _ in range(3)
        ]
        # The channels of a photo are strongly correlated.
        values = np.stack([layers[0] + 0.3 * layer for layer in layers], axis=2)
        pixels = np.clip(128 + 45 * values / values.std(), 0, 255).astype(np.uint8)
        image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
        draw = ImageDraw.Draw(image)
        for _ in range(8):
            x, y = rng.integers(0, width), rng.integers(0, height)
            length = int(rng.integers(height // 20, height // 4))
            color = tuple(int(value) for value in rng.integers(0, 256, 3))
            shape = draw.ellipse if rng.integers(2) else draw.rectangle
            shape((int(x), int(y), int(x) + length, int(y) + length), fill=color)
        file = folder / f"{width}x{height}_{number}.jpg"
        image.save(file, quality=90)
        files.append(str(file))
    return files


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--images", type=Path, help="folder of JPEGs; default: generated images")
    parser.add_argument("--count", type=int, default=18, help="number of 640x480 images")
    parser.add_argument("--rounds", type=int, default=7, help="report medians over so many rounds")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    print(f"\nloader: {environment()}, Pillow {PIL.__version__}, OpenCV {cv2.__version__}\n")
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), args.images, args.count, args.rounds)


def run(folder: Path, images: Path | None, count: int, rounds: int) -> None:
    """Measure everything and print the tables."""
    rows, stages_of_settings = [], []
    if images:
        jpegs = [str(f) for f in sorted(images.iterdir()) if f.suffix.lower() in (".jpg", ".jpeg")]
        small = jpegs[:: max(1, len(jpegs) // count)][:count]
        print(f"Small images: {len(small)} of {images}; large images are generated.\n")
    else:
        small = write_jpegs(folder, (480, 640), count)
        print("All images are generated.\n")
    large = write_jpegs(folder, (3024, 4032), max(1, count // 6))
    for name, size, short_sides in SETTINGS:
        row, stages = compare(small if size[0] < 1000 else large, short_sides, rounds)
        rows.append([name, *row])
        stages_of_settings.append(stages)
    print("Two views of an image: milliseconds of one core, and speedups over Pillow")
    headers = ["files, views", "Pillow", "ours", "speedup"]
    headers += ["reduced decoding", "speedup", "samples/s", "difference"]
    print(tabulate(rows, headers, floatfmt=".2f"))
    for (name, *_), stages in list(zip(SETTINGS, stages_of_settings, strict=True))[:2]:
        order = dict.fromkeys(stage for _, stage in stages)
        table = [[s, stages.get(("pillow", s)), stages.get(("ours", s))] for s in order]
        print(f"\nBy stage, in milliseconds, {name}")
        print(tabulate(table, ["stage", "Pillow", "ours"], floatfmt=".2f"))
    image = resize_bilinear(read_image(small[0], "RGB"), 800, 1066)
    print("\nColor operations on 1066x800, in milliseconds")
    print(tabulate(color_rows(image, 5 * rounds), ["operation", "Pillow", "ours"], floatfmt=".2f"))
    print(
        "\nDifference of a view from full decoding and Pillow's bilinear filter, in levels of 255"
    )
    for kind, files in (("small", small), ("large", large)):
        print(f"\n{kind} images, {MIN_OVERSAMPLING} decoded pixels for one of the view")
        headers = ["decoded at", "method", "mean", "PSNR, dB"]
        print(tabulate(reduced_decoding_rows(files), headers, floatfmt=".2f"))


if __name__ == "__main__":
    main()
