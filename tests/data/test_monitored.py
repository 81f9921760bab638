"""Choice of monitored images, their ground truth, and independence of training."""

import json
import random

import numpy as np
import pytest
import torch

from locreweight.data.mapper import ViewMapper
from locreweight.data.monitored import MonitoredImages, ground_truth_in_view, has_annotations
from locreweight.data.training_sets import load_training_sets, register_datasets
from locreweight.errors import UsageError
from tests.modeling.tiny_model import tiny_config
from tests.tiny_data import CLASSES, edit_json, make_coco, make_folder
from tests.tiny_formats import as_labelme


@pytest.fixture
def coco(tmp_path):
    def make(name, **arguments):
        json_file, images = make_coco(tmp_path / name, **arguments)
        return f"coco:{json_file}:{images}"

    return make


def sets(settings):
    cfg = tiny_config({"VIS_PERIOD": 1, "DATASETS.TEST": ()} | settings)
    register_datasets(cfg)
    return load_training_sets(cfg)


def names(records):
    return {record["file_name"] for record in records}


def test_ground_truth_of_images_set_aside(coco):
    settings = {"DATASETS.TRAIN": [coco("a", images=10)], "DATASETS.LABELED_PERCENT": 20.0}
    found = sets(settings)
    assert names(found.monitored) == names(found.unlabeled)
    assert all(
        has_annotations(record) and len(record["annotations"]) == 2 for record in found.monitored
    )


def test_training_does_not_get_the_ground_truth(coco):
    found = sets({"DATASETS.TRAIN": [coco("a", images=10)], "DATASETS.LABELED_PERCENT": 20.0})
    assert all(record.keys() == {"file_name", "image_id"} for record in found.unlabeled)


def test_ground_truth_of_annotated_unlabeled_sets(coco, tmp_path):
    folder = make_folder(tmp_path / "folder", images=6)
    settings = {
        "DATASETS.TRAIN": [coco("a")],
        "DATASETS.UNLABELED": [coco("b", images=3, seed=5), f"folder:{folder}"],
    }
    found = sets(settings)
    assert len(found.unlabeled) == 9
    assert len(found.monitored) == 3 and all(has_annotations(record) for record in found.monitored)


def test_images_that_nobody_annotated_have_no_ground_truth(coco, tmp_path):
    """They would count as images without objects."""
    make_coco(tmp_path / "source", images=6, seed=5)
    name = as_labelme(tmp_path / "source", tmp_path / "data")
    for annotation in sorted((tmp_path / "data").glob("*.json"))[2:]:
        annotation.unlink()
    settings = {
        "DATASETS.TRAIN": [coco("a")],
        "DATASETS.UNLABELED": [name],
        "DATASETS.CLASS_NAMES": CLASSES,
    }
    for truth in ([], [name]):
        found = sets(settings | {"DATASETS.UNLABELED_TRUTH": truth})
        assert len(found.unlabeled) == 6
        assert [len(record["annotations"]) for record in found.monitored] == [2, 2]


def test_folder_without_ground_truth(coco, tmp_path):
    folder = make_folder(tmp_path / "folder", images=6)
    settings = {"DATASETS.TRAIN": [coco("a")], "DATASETS.UNLABELED": [f"folder:{folder}"]}
    found = sets(settings)
    assert len(found.monitored) == 6 and not any(
        has_annotations(record) for record in found.monitored
    )


def test_ground_truth_of_a_folder(coco):
    truth = coco("b", images=4, seed=5)
    folder = truth.rsplit(":", 1)[1]
    settings = {
        "DATASETS.TRAIN": [coco("a")],
        "DATASETS.UNLABELED": [f"folder:{folder}"],
        "DATASETS.UNLABELED_TRUTH": [truth],
    }
    assert [len(record["annotations"]) for record in sets(settings).monitored] == [2] * 4


@pytest.mark.parametrize(
    ("classes", "message"), [(("cat", "dog", "emu"), "classes"), (None, "is an unlabeled image")]
)
def test_ground_truth_of_other_classes_or_images(coco, tmp_path, classes, message):
    other = coco("b", **({"classes": classes} if classes else {}))
    folder = make_folder(tmp_path / "folder")
    settings = {
        "DATASETS.TRAIN": [coco("a")],
        "DATASETS.UNLABELED": [f"folder:{folder}"],
        "DATASETS.UNLABELED_TRUTH": [other],
    }
    with pytest.raises(UsageError, match=message):
        sets(settings)


def test_unlabeled_set_with_other_classes(coco):
    other = coco("b", classes=("emu", "fox", "gnu"), seed=3)
    found = sets({"DATASETS.TRAIN": [coco("a")], "DATASETS.UNLABELED": [other]})
    assert len(found.monitored) == 4 and not any(
        has_annotations(record) for record in found.monitored
    )


def test_set_without_annotations_has_no_ground_truth(coco):
    name = coco("b", seed=3)
    from pathlib import Path

    edit_json(Path(name.split(":")[1]), lambda content: content | {"annotations": []})
    found = sets({"DATASETS.TRAIN": [coco("a")], "DATASETS.UNLABELED": [name]})
    assert not any(has_annotations(record) for record in found.monitored)


@pytest.mark.parametrize(
    ("changed", "count"),
    [({"TEST.MONITORED_IMAGES": 3}, 3), ({"TEST.MONITORED_IMAGES": 0}, 0), ({"VIS_PERIOD": 0}, 0)],
)
def test_number_and_choice_of_images(coco, changed, count):
    settings = {"DATASETS.TRAIN": [coco("a", images=20)], "DATASETS.LABELED_PERCENT": 20.0}
    first, second = (sets(settings | changed).monitored for _ in range(2))
    assert len(first) == count
    assert names(first) == names(second)


def test_ground_truth_in_the_view():
    record = {
        "annotations": [
            {"bbox": [10, 20, 30, 40], "bbox_mode": 1, "category_id": 2},
            {"bbox": [0, 0, 8, 8], "bbox_mode": 1, "category_id": 0, "iscrowd": 1},
            {"bbox": [90, 90, 5, 5], "bbox_mode": 1, "category_id": 1},
        ]
    }
    # Half the size, mirrored; the last one leaves the view.
    matrix = torch.tensor([[-0.5, 0, 40], [0, 0.5, 0], [0, 0, 1]], dtype=torch.float64)
    truth = ground_truth_in_view(record, matrix, (40, 40))
    assert truth.gt_boxes.tensor.tolist() == [[20, 10, 35, 30], [36, 0, 40, 4]]
    assert truth.gt_classes.tolist() == [2, 0]
    assert truth.gt_crowd.tolist() == [False, True]


def test_image_without_objects():
    assert len(ground_truth_in_view({"annotations": []}, torch.eye(3), (40, 40))) == 0


@pytest.fixture
def monitored(tmp_path):
    _, folder = make_coco(tmp_path / "set", images=3)
    records = [{"file_name": str(file), "annotations": []} for file in sorted(folder.iterdir())]
    return MonitoredImages(records, ViewMapper(tiny_config()), seed=3)


def test_views_are_the_same_each_time(monitored):
    first, second = ([sample.views for sample in monitored] for _ in range(2))
    assert len({views.file_name for views in first}) == len(monitored) == 3
    for one, other in zip(first, second, strict=True):
        assert one.file_name == other.file_name
        assert torch.equal(one.weak.image, other.weak.image)
        assert torch.equal(one.strong.image, other.strong.image)
        assert torch.equal(one.strong.matrix, other.strong.matrix)


def test_monitoring_does_not_change_random_generators(monitored):
    def states():
        return json.dumps(
            [
                np.random.get_state()[1].tolist(),
                random.getstate(),
                torch.get_rng_state().tolist(),
            ]
        )

    before = states()
    assert len(list(monitored)) == 3
    assert states() == before
