"""Data in order for tools/check_data.py, and pictures that do not look alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

import check_data
from tests.modeling.tiny_model import TINY, as_options
from tests.tiny_data import make_coco, make_folder

BASE = str(Path(__file__).parents[1] / "configs/Base-LocReweight.yaml")
SIDE = 96


class Project:
    """Data in order, and the words that name them; tests spoil one thing."""

    def __init__(self, folder):
        self.folder = folder
        self.json, self.images = make_coco(folder / "labeled", 5, 4, size=SIDE, seed=1)
        self.test_json, self.test_images = make_coco(folder / "test", 3, 4, size=SIDE, seed=2)
        self.unlabeled = make_folder(folder / "unlabeled", images=4, size=SIDE, seed=3)
        for i, image in enumerate(sorted(folder.rglob("*.png"))):
            paint(image, seed=i)
        self.settings = TINY | {
            "MODEL.RESNETS.NORM": "BN",  # as random weights need it
            "DATASETS.TRAIN": [f"coco:{self.json}:{self.images}"],
            "DATASETS.TEST": [f"coco:{self.test_json}:{self.test_images}"],
            "DATASETS.UNLABELED": [f"folder:{self.unlabeled}"],
        }

    def arguments(self, *flags):
        return check_data.parse_arguments([*flags, *self.words])

    @property
    def words(self):
        return ["--config-file", BASE, *as_options(self.settings)]

    def findings(self):
        return check_data.check(self.arguments())

    def texts(self, severity):
        return [finding.text for finding in self.findings() if finding.severity is severity]


def paint(file, seed):
    """Broad strokes, so that two pictures do not look alike."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file)
