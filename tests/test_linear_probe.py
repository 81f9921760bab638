"""The linear probe, and pretrained features of real photographs.

Weights and data are not part of the project. The last test looks for torchvision's MobileNetV2 and
for the NEU steel defects (Pascal VOC layout) where the environment variables
LOCREWEIGHT_MOBILENET_V2 and LOCREWEIGHT_NEU say, or in ../shared.
"""

import os
from pathlib import Path

import pytest
import torch

from benchmarks.linear_probe import compare, probe_accuracy
from locreweight.config import load_config
from tests.modeling.tiny_model import ROOT, as_options

SHARED = ROOT.parent / "shared"
NEU = Path(os.environ.get("LOCREWEIGHT_NEU") or SHARED / "data/neu")
MOBILENET = Path(
    os.environ.get("LOCREWEIGHT_MOBILENET_V2") or SHARED / "weights/mobilenet_v2_imagenet.pth"
)
NEU_CLASSES = ["crazing", "inclusion", "patches", "pitted_surface", "rolled-in_scale", "scratches"]


def test_probe_separates_what_is_separable():
    classes = torch.arange(60) % 3
    features = torch.randn(60, 6)
    features[:, :3] += 20 * torch.nn.functional.one_hot(classes, 3)
    half = slice(None, 30), slice(30, None)
    train, test = ((features[part], classes[part]) for part in half)
    assert probe_accuracy(*train, *test, ridge=0.01) == 100.0
    # Mean over classes: of five crops of class 0 and one of class 2, the latter is wrong.
    picked = torch.tensor([0, 3, 6, 9, 12, 13])
    labels = torch.tensor([0, 0, 0, 0, 0, 2])
    assert probe_accuracy(*train, test[0][picked], labels, ridge=0.01) == 50.0


@pytest.mark.skipif(
    not (NEU.is_dir() and MOBILENET.is_file()), reason=f"{NEU} or {MOBILENET} does not exist"
)
def test_pretrained_features_of_photographs_separate_classes_better_than_random_ones():
    settings = {
        "MODEL.TIMM.PRETRAINED": MOBILENET,
        "DATASETS.TRAIN": [f"voc:{NEU}:train"],
        "DATASETS.TEST": [f"voc:{NEU}:test"],
        "DATASETS.CLASS_NAMES": NEU_CLASSES,
    }
    cfg = load_config(str(ROOT / "configs/detectors/cpu-mobilenetv2.yaml"), as_options(settings))
    (*_, pretrained), (*_, random) = compare(cfg, per_class=30)
    assert float(pretrained) > 90
    assert float(pretrained) > float(random) + 10  # 96.4 and 75.8 with 60 crops of each class
