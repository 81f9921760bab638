"""Training on real images with real mistakes in their annotations: the BCCD blood cells.

The set is not part of the project. These tests look for it in the folder that the environment
variable LOCREWEIGHT_BCCD names, or in ../shared/data/bccd.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

import train_net
from locreweight.config import load_config
from locreweight.data.training_sets import load_training_sets, register_datasets
from tests.engine.tiny_training import restored_loggers_and_signals
from tests.modeling.tiny_model import TINY, as_options

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs/bccd.yaml"
BCCD = Path(os.environ.get("LOCREWEIGHT_BCCD") or ROOT.parent / "shared/data/bccd")
WITHOUT_AREA = {"BloodImage_00338.jpg", "BloodImage_00343.jpg"}

pytestmark = pytest.mark.skipif(
    not BCCD.is_dir(),
    reason=f"the BCCD data set is not at {BCCD}; LOCREWEIGHT_BCCD can name its folder",
)


@pytest.fixture
def small_test_set(tmp_path):
    """Three of the images for testing, in the layout of the whole set."""
    folder = tmp_path / "bccd"
    (folder / "ImageSets/Main").mkdir(parents=True)
    for part in ("Annotations", "JPEGImages"):
        (folder / part).symlink_to(BCCD.resolve() / part)
    names = (BCCD / "ImageSets/Main/test.txt").read_text().splitlines()
    (folder / "ImageSets/Main/few.txt").write_text("\n".join(names[:3]))
    return f"voc:{folder}:few"


@pytest.mark.parametrize("split", ["train", "val"])
def test_boxes_without_area(split, caplog):
    """One in each split."""
    name = f"voc:{BCCD}:{split}"
    settings = {
        "DATASETS.TRAIN": [name],
        "DATASETS.TEST": (),
        "DATASETS.LABELED_PERCENT": 100.0,
        "SEMI.BURN_IN_ITERS": 10**6,  # labeled images only
    }
    cfg = load_config(str(CONFIG), as_options(settings))
    register_datasets(cfg)
    boxes = sum(len(record["annotations"]) for record in DatasetCatalog.get(name))
    with caplog.at_level(logging.WARNING, logger="locreweight"):
        labeled = load_training_sets(cfg).labeled
    assert sum(len(record["annotations"]) for record in labeled) == boxes - 1
    assert "left out 1 boxes that have no area" in caplog.text
    assert sum(name in caplog.text for name in WITHOUT_AREA) == 1
    assert MetadataCatalog.get(name).thing_classes == ["RBC", "WBC", "Platelets"]


def test_training_with_a_tenth_of_the_labels(small_test_set, tmp_path):
    """By its config, but for the size of model and images and the number of iterations."""
    settings = {
        **TINY,
        "MODEL.RESNETS.NORM": "BN",
        "INPUT.MIN_SIZE_TRAIN": [72, 96],
        "INPUT.MAX_SIZE_TRAIN": 128,
        "INPUT.MIN_SIZE_TEST": 96,
        "INPUT.MAX_SIZE_TEST": 128,
        "DATASETS.TRAIN": [f"voc:{BCCD}:train"],
        "DATASETS.TEST": [small_test_set],
        "SEMI.BURN_IN_ITERS": 1,
        "SEMI.PSEUDO_LABEL_THRESHOLD": 0.2,
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.IMS_PER_BATCH_UNLABELED": 2,
        "SOLVER.BASE_LR": 0.001,
        "SOLVER.MAX_ITER": 3,
        "TEST.EVAL_PERIOD": 0,
        "OUTPUT_DIR": tmp_path / "output",
    }
    args = train_net.argument_parser().parse_args(
        ["--config-file", str(CONFIG), *as_options(settings)]
    )
    with restored_loggers_and_signals():
        results = train_net.main(args)
    assert {"bbox/AP", "bbox/AP50", "student/bbox/AP"} <= set(results)
    lines = (tmp_path / "output/metrics.json").read_text().splitlines()
    metrics = {name: value for line in lines for name, value in json.loads(line).items()}
    for name in ("bbox/AP", "bbox/AP-Platelets", "voc_11_point/AP50", "student/voc_11_point/AP"):
        assert name in metrics
    assert metrics["pseudo_labels/per_image"] > 0
    assert "20 labeled and 185 unlabeled images" in (tmp_path / "output/log.txt").read_text()
