"""Evaluation of teacher and student on one or several test sets."""

import json
from pathlib import Path

import pytest
from detectron2.data import MetadataCatalog

from locreweight.data.training_sets import register_datasets
from locreweight.engine import evaluation
from locreweight.engine.evaluation import evaluate, evaluate_teacher_and_student, main_metric
from locreweight.errors import UsageError
from tests.engine.tiny_training import training_config
from tests.modeling.tiny_model import tiny_config, tiny_model
from tests.tiny_data import CLASSES, make_coco, make_voc


@pytest.fixture
def config_with(datasets, tmp_path):
    def make(*test_sets):
        settings = {"DATASETS.TEST": list(test_sets), "DATASETS.CLASS_NAMES": list(CLASSES)}
        cfg = training_config(datasets, tmp_path / "output", settings)
        register_datasets(cfg)
        return cfg

    return make


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def test_coco_dataset_has_coco_style_ap(config_with, datasets, model):
    results = evaluate(config_with(*datasets["DATASETS.TEST"]), model)
    assert set(results) == {"bbox"}
    assert {"AP", "AP50", "AP75"} <= set(results["bbox"])


def test_voc_dataset_also_has_11_point_ap(config_with, tmp_path, model):
    folder = make_voc(tmp_path / "voc")
    results = evaluate(config_with(f"voc:{folder}:trainval"), model)
    assert set(results) == {"bbox", "voc_11_point"}
    assert {"AP", "AP50", "AP75"} <= set(results["bbox"])
    assert set(results["voc_11_point"]) == {"AP", "AP50", "AP75"}


def test_results_of_several_test_sets_are_keyed_by_name(config_with, tmp_path, datasets, model):
    first, second = datasets["DATASETS.TEST"][0], f"voc:{make_voc(tmp_path / 'voc')}:trainval"
    cfg = config_with(first, second)
    results = evaluate(cfg, model)
    assert set(results) == {first, second}
    assert main_metric(cfg) == f"{first}/bbox/AP"
    assert main_metric(config_with(first)) == "bbox/AP"


def test_detections_of_each_test_set_are_kept(config_with, tmp_path, datasets, model):
    first = datasets["DATASETS.TEST"][0]
    second = "coco:{}:{}".format(*make_coco(tmp_path / "second", images=5, seed=3))
    cfg = config_with(first, second)
    evaluate(cfg, model)
    files = list(Path(cfg.OUTPUT_DIR).rglob("coco_instances_results.json"))
    assert len(files) == 2
    images = [{x["image_id"] for x in json.loads(file.read_text())} for file in files]
    expected = [
        {x["id"] for x in json.loads(Path(name.split(":")[1]).read_text())["images"]}
        for name in (first, second)
    ]
    assert sorted(images, key=len) == sorted(expected, key=len)
    assert sum("second-images" in file.parent.name for file in files) == 1


def test_ground_truth_is_converted_in_each_evaluation(config_with, tmp_path, model):
    """A cached file might be older than the annotations."""
    name = f"voc:{make_voc(tmp_path / 'voc')}:trainval"
    cfg = config_with(name)
    evaluate(cfg, model)
    converted = MetadataCatalog.get(name).json_file
    assert converted.startswith(cfg.OUTPUT_DIR)
    with open(converted) as f:
        assert len(json.load(f)["annotations"]) == 8
    del MetadataCatalog.get(name).json_file  # as in a new process
    with open(converted, "w") as f:
        f.write("stale")
    evaluate(cfg, model)


def test_classes_other_than_those_of_the_model_are_an_error(config_with, tmp_path, model):
    json_file, images = make_coco(tmp_path / "two", classes=("cat", "dog"))
    cfg = config_with(f"coco:{json_file}:{images}")
    cfg.DATASETS.CLASS_NAMES = []
    with pytest.raises(UsageError, match="2 classes"):
        evaluate(cfg, model)


@pytest.mark.parametrize("classes", [("horse", *CLASSES[1:]), CLASSES[::-1]], ids=["name", "order"])
def test_class_names_of_the_config_must_be_those_of_the_test_set(
    config_with, tmp_path, model, classes
):
    """A Detectron2 checkpoint does not name its classes, so only the config can."""
    json_file, images = make_coco(tmp_path / "other", classes=classes)
    cfg = config_with(f"coco:{json_file}:{images}")
    with pytest.raises(UsageError, match="(?s)DATASETS.CLASS_NAMES.*ALLOW_OTHER_CLASS_NAMES True"):
        evaluate(cfg, model)
    cfg.DATASETS.CHECKS.ALLOW_OTHER_CLASS_NAMES = True
    assert "bbox" in evaluate(cfg, model)


@pytest.mark.parametrize("identical", [True, False])
def test_student_is_evaluated_unless_it_equals_the_teacher(monkeypatch, identical):
    precision = {"teacher": 40.0, "student": 40.0 if identical else 30.0}
    evaluated = []

    def fake_evaluate(_, model, model_name, keep_detections, analysis_file=None):
        assert not keep_detections  # one model's would overwrite the other's
        assert model in model_name
        assert (analysis_file is not None) == (model == "teacher")
        evaluated.append(model)
        return {"bbox": {"AP": precision[model]}}

    monkeypatch.setattr(evaluation, "evaluate", fake_evaluate)
    results = evaluate_teacher_and_student(
        tiny_config({}), "teacher", "student", iteration=3, identical=identical
    )
    assert results["bbox"]["AP"] == 40.0
    assert results["student"]["bbox"]["AP"] == precision["student"]
    assert evaluated == (["teacher"] if identical else ["teacher", "student"])
