"""The reference of benchmarks/loader.py: two views of an image, each operation by Pillow."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from detectron2.data import transforms as T
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from locreweight.data.transforms.augmentations import RandomErasing, RandomGeometricOperation

MAX_SIZE = 1333  # of a view's long side
PILLOW_COLOURS: list[Callable[[Image.Image, float], Image.Image]] = [
    lambda image, strength: image,
    lambda image, strength: ImageOps.autocontrast(image),
    lambda image, strength: ImageOps.equalize(image),
    lambda image, strength: ImageOps.solarize(image, int(128 * strength)),
    lambda image, strength: ImageOps.posterize(image, 4 + int(2 * strength)),
    lambda image, strength: ImageEnhance.Color(image).enhance(strength),
    lambda image, strength: ImageEnhance.Contrast(image).enhance(strength),
    lambda image, strength: ImageEnhance.Brightness(image).enhance(strength),
    lambda image, strength: ImageEnhance.Sharpness(image).enhance(strength),
]


class Stopwatch:
    """Milliseconds of the processor by stage."""

    def __init__(self) -> None:
        self.milliseconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.milliseconds[stage] += 1e3 * (time.process_time() - start)


class PlainPillow:
    """The reference: a mapper that decodes once and does every operation with Pillow."""

    def __init__(self, short_sides: tuple[int, int], fill: tuple[float, float, float]) -> None:
        self.short_sides = short_sides
        self.fill = fill
        self.geometry = RandomGeometricOperation(fill)
        self.erasing = RandomErasing(fill)

    def two_views(self, file: str, watch: Stopwatch) -> list[torch.Tensor]:
        """The weak and the strong view, ``(3, H, W)`` uint8 BGR."""
        with watch("decode"):
            image = Image.open(file).convert("RGB")
        views = []
        for strong in (False, True):
            view = self._resize_and_flip(image, watch)
            if strong:
                view = self._strong(view, watch)
            with watch("to tensor"):
                views.append(
                    torch.from_numpy(np.asarray(view)[:, :, ::-1].transpose(2, 0, 1).copy())
                )
        return views

    def _resize_and_flip(self, image: Image.Image, watch: Stopwatch) -> Image.Image:
        with watch("resize"):
            side = np.random.randint(self.short_sides[0], self.short_sides[1] + 1)
            shape = T.ResizeShortestEdge.get_output_shape(image.height, image.width, side, MAX_SIZE)
            image = image.resize(shape[::-1], Image.Resampling.BILINEAR)
        with watch("flip"):
            return ImageOps.mirror(image) if np.random.uniform() < 0.5 else image

    def _strong(self, image: Image.Image, watch: Stopwatch) -> Image.Image:
        size = np.empty((image.height, image.width, 0))  # all that the two augmentations look at
        fill = tuple(round(value) for value in self.fill)
        with watch("color"):
            strength = np.random.uniform(0.1, 1.9)
            image = PILLOW_COLOURS[np.random.randint(len(PILLOW_COLOURS))](image, strength)
        with watch("geometry"):
            back = np.linalg.inv(self.geometry.get_transform(size).matrix)[:2].ravel().tolist()
            bilinear, affine = Image.Resampling.BILINEAR, Image.Transform.AFFINE
            image = image.transform(image.size, affine, back, bilinear, fillcolor=fill)
        with watch("erase"):
            draw = ImageDraw.Draw(image)
            for x1, y1, x2, y2 in self.erasing.get_transform(size).patches:
                if x2 > x1 and y2 > y1:
                    draw.rectangle((x1, y1, x2 - 1, y2 - 1), fill)
        return image
