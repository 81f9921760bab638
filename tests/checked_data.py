"""Valid data for tests of tools/check_data.py, and images that do not look similar."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from locreweight.config import load_config
from locreweight.engine.data_report import check_data
from tests.modeling.tiny_model import TINY, as_options
from tests.tiny_data import make_coco, make_folder

BASE = str(Path(__file__).parents[1] / "configs/Base-LocReweight.yaml")
SIDE = 96


class Project:
    """Valid data sets and the arguments that name them. Each test breaks one thing."""

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

    @property
    def options(self):
        return as_options(self.settings)

    @property
    def arguments(self):
        return ["--config-file", BASE, *self.options]

    def report(self):
        return check_data(lambda options: load_config(BASE, options), self.options, num_gpus=1)

    def findings(self):
        return self.report().findings

    def texts(self, severity):
        return [finding.text for finding in self.findings() if finding.severity is severity]


def paint(file, seed):
    """Draw large random shapes, so that no two images look similar."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file)
