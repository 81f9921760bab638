"""Every format from end to end: reading, splits, resuming, training, evaluation and the report."""

import logging

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from locreweight.data.datasets.catalog import register
from locreweight.data.datasets.splits import write_split_file
from locreweight.data.inspection.findings import Severity
from locreweight.data.training_sets import load_training_sets, register_datasets
from locreweight.errors import UsageError
from tests.checked_data import Project
from tests.engine.tiny_training import build_trainer, recorded_training, training_config
from tests.perfect_detections import evaluate_perfect
from tests.tiny_data import CLASSES, make_coco, make_folder
from tests.tiny_formats import FORMATS

SIZE = (48, 64)


@pytest.fixture(params=FORMATS.values(), ids=FORMATS)
def make(request, tmp_path):
    """Makes a data set in the format; returns its name."""

    def write(name, images=6, seed=1, size=SIZE):
        source = tmp_path / f"{name}_source"
        make_coco(source, images=images, seed=seed, size=size)
        return request.param(source, tmp_path / name)

    return write


def named_boxes(name):
    """(class, x1, y1, x2, y2) of all images, which are in the order of their names."""
    records = DatasetCatalog.get(name)
    classes = MetadataCatalog.get(name).thing_classes
    return [
        (classes[a["category_id"]], *np.round(_corners(a), 3))
        for record in records
        for a in record["annotations"]
    ]


def _corners(annotation):
    return BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)


def test_the_boxes_are_those_of_coco(make, tmp_path):
    name = make("set")
    register([name], CLASSES)
    found = named_boxes(name)
    reference = FORMATS["coco"](tmp_path / "set_source", tmp_path / "reference")
    register([reference])
    expected = named_boxes(reference)
    assert [box[0] for box in found] == [box[0] for box in expected]
    corners = [box[1:] for box in found]
    assert corners == pytest.approx(np.array([box[1:] for box in expected]), abs=1e-3)
    sizes = {(record["height"], record["width"]) for record in DatasetCatalog.get(name)}
    assert sizes == {SIZE}


def test_perfect_detections_have_an_ap_of_100(make, tmp_path):
    results = evaluate_perfect(make("set"), tmp_path / "output")
    assert results["bbox"]["AP"] == pytest.approx(100)


def config(make, tmp_path, **settings):
    datasets = {
        "DATASETS.TRAIN": [make("train")],
        "DATASETS.UNLABELED": [f"folder:{make_folder(tmp_path / 'more', size=SIZE, seed=5)}"],
        "DATASETS.TEST": [make("test", images=3, seed=2)],
    }
    settings = {"DATASETS.CLASS_NAMES": list(CLASSES), **settings}
    return training_config(datasets, tmp_path / "output", datasets | settings)


def test_a_training_with_a_split_and_evaluation(make, tmp_path):
    cfg = config(
        make, tmp_path, **{"DATASETS.LABELED_PERCENT": 50.0, "TEST.EVAL_PERIOD": 4, "VIS_PERIOD": 4}
    )
    trainer = build_trainer(cfg)
    assert len(trainer.sets.labeled) == 3
    assert len(trainer.sets.unlabeled) == 3 + 4
    assert trainer.sets.class_names == list(CLASSES)
    recorded = recorded_training(trainer)
    assert 0 <= recorded.results["bbox/AP"] <= 100


def test_a_split_file(make, tmp_path):
    settings = {"DATASETS.LABELED_PERCENT": 50.0, "DATASETS.SPLIT_SEED": 3}
    cfg = config(make, tmp_path, **settings)
    register_datasets(cfg)
    drawn = load_training_sets(cfg)
    name = cfg.DATASETS.TRAIN[0]
    file = tmp_path / "split.json"
    write_split_file(file, {name: DatasetCatalog.get(name)}, [50.0], [3])
    cfg.DATASETS.SPLIT_FILE = str(file)
    read = load_training_sets(cfg)
    assert list(read.labeled) == list(drawn.labeled)
    assert read.fingerprint == drawn.fingerprint
    other = make("other", seed=7)
    cfg.DATASETS.TRAIN = (other,)
    register_datasets(cfg)
    if not other.endswith(":all"):  # the list of images is the same, and defines the split
        with pytest.raises(UsageError, match="SHA-256"):
            load_training_sets(cfg)


def test_the_data_report(make, tmp_path):
    project = Project(tmp_path / "project")
    project.settings["DATASETS.TRAIN"] = [make("train", images=4)]
    project.settings["DATASETS.CLASS_NAMES"] = list(CLASSES)
    report = project.report()
    assert [f.text for f in report.findings if f.severity is Severity.ERROR] == []
    assert "| labeled" in report.overview and "4" in report.overview


def test_unlabeled_images_need_no_usable_annotations(make, tmp_path, caplog, monkeypatch):
    """Of other classes: the images are used, the annotations are not."""
    name = make("set")
    if name.startswith(("coco:", "yolo:")):
        return  # the format lists its own classes, which may be any
    register([name], ["zebra"], labeled=False)
    monkeypatch.setattr(logging.getLogger("locreweight"), "propagate", True)
    with caplog.at_level(logging.INFO):
        records = DatasetCatalog.get(name)
    assert len(records) == 6 and not any("annotations" in record for record in records)
    assert "'zebra'" in caplog.text
