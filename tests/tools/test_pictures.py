"""Tools that draw views and detections, and the export of pseudo-labels."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image

import compare_detections
import export_pseudo_labels
import plot_localization_quality
import show_views
from locreweight.data.datasets.catalog import load_coco
from locreweight.engine.detection_files import coco_entries
from locreweight.engine.detections import Detections
from locreweight.engine.predictor import Predictor
from tests.modeling.tiny_model import TINY, as_options

BASE = Path(__file__).parents[2] / "configs/Base-LocReweight.yaml"


def size_of(file):
    with Image.open(file) as image:
        return image.size


def config_options(run):
    return ["--config-file", BASE], as_options(
        TINY | {"MODEL.RESNETS.NORM": "BN", "DATASETS.TRAIN": (run.test_set,)}
    )


def test_views_with_a_random_student(run, call, tmp_path):
    config, options = config_options(run)
    code, printed = call(
        show_views, *config, "--output", tmp_path / "v.jpg", "--count", 2, *options
    )
    assert code == 0 and "2 images" in printed.out
    assert size_of(tmp_path / "v.jpg")[0] > 2 * 400


def test_views_are_those_of_the_method(run, call, tmp_path, monkeypatch):
    policies = []
    monkeypatch.setattr(
        show_views,
        "draw_view_table",
        lambda cfg, *_: policies.append(cfg.INPUT.AUGMENTATION_POLICY) or np.zeros((8, 8, 3), "u1"),
    )
    config, options = config_options(run)
    for method in ([], ["--method", "stac"]):
        output = ["--output", tmp_path / "v.png"]
        assert call(show_views, *config, *method, *output, *options)[0] == 0
    assert policies == ["SoftTeacherPolicy", "STACPolicy"]


def test_views_of_given_images_with_a_trained_student(run, call, tmp_path):
    """Images that are in no annotated dataset are drawn without ground truth."""
    config, options = config_options(run)
    inputs = ["--input", run.unlabeled / "0000.png", run.test_images / "0001.png"]
    weights = ["--weights", run.output]
    code, printed = call(
        show_views, *config, *inputs, *weights, "--output", tmp_path / "v.png", *options
    )
    assert code == 0 and "2 images" in printed.out


def test_unreadable_image_is_an_error(run, call, tmp_path):
    config, options = config_options(run)
    (tmp_path / "broken.png").write_bytes(b"no image")
    inputs = ["--input", tmp_path / "broken.png", run.test_images / "0001.png"]
    code, _ = call(show_views, *config, *inputs, "--output", tmp_path / "v.png", *options)
    assert "broken.png" in code and not (tmp_path / "v.png").exists()


def test_compare_detections_has_a_column_per_checkpoint(run, call, tmp_path):
    files = [run.output / name for name in ("model_best.pth", "model_final.pth")]
    arguments = ["--weights", *files, "--output", tmp_path / "c.png", "--count", 2]
    assert call(compare_detections, *arguments)[0] == 0
    width, height = size_of(tmp_path / "c.png")
    cell = compare_detections.SIDE + 4
    assert width == 3 * cell and height == 2 * (cell + 22) + 22, "two rows and a legend"


def test_compare_detections_needs_a_different_name_per_checkpoint(run, call, tmp_path):
    arguments = ["--weights", run.output, run.output, "--output", tmp_path / "a.png"]
    for names in (["a", "a"], ["a", "b", "b"]):
        code, _ = call(compare_detections, *arguments, "--names", *names)
        assert code == "error: 2 checkpoints need 2 different --names"


def test_compare_detections_rejects_images_of_another_dataset(run, call, tmp_path):
    code, _ = call(
        compare_detections,
        *("--weights", run.output, "--output", tmp_path / "c.png"),
        *("--input", run.unlabeled / "0000.png"),
    )
    assert "is not in the data set" in code


@pytest.mark.parametrize("tool", [show_views, compare_detections, plot_localization_quality])
@pytest.mark.parametrize("name", ["views", "views.foo"])
def test_unknown_picture_format_is_an_error(call, tool, name):
    code, printed = call(tool, "--config-file", "a", "--weights", "b", "--output", name)
    assert code == 2 and f"{name} is not a" in printed.err


def test_export_pseudo_labels_writes_a_coco_dataset(run, call, tmp_path):
    file = tmp_path / "labels.json"
    code, printed = call(
        export_pseudo_labels, "--weights", run.output, "--json", file, "--device", "cpu"
    )
    assert code == 0
    name = printed.out.split("as a dataset: ")[1].strip()
    assert name == f"coco:{file}:{run.unlabeled}"
    records = load_coco("exported", str(file), str(run.unlabeled))
    assert len(records) == 5 and all(Path(r["file_name"]).is_file() for r in records)
    detector = Predictor(str(run.output), device="cpu")
    threshold = detector.cfg.SEMI.PSEUDO_LABEL_THRESHOLD
    annotations = json.loads(file.read_text())["annotations"]
    assert annotations and all(a["score"] > threshold for a in annotations)
    assert len(annotations) == sum(len(record["annotations"]) for record in records)


@pytest.mark.parametrize(("has_localization_quality", "expected"), [(True, 0.25), (False, None)])
def test_localization_quality_is_null_for_plain_detectors(has_localization_quality, expected):
    instances = Instances((8, 8), pred_boxes=Boxes(torch.tensor([[1.0, 2, 5, 6]])))
    instances.pred_classes, instances.scores = torch.tensor([0]), torch.tensor([0.9])
    instances.localization_quality = torch.tensor([0.25])
    image = np.zeros((8, 8, 3), np.uint8)
    (entry,) = coco_entries(Detections(image, instances, ["cat"], has_localization_quality))
    assert entry["localization_quality"] == expected
    assert (entry["category_id"], entry["bbox"]) == (1, [1.0, 2.0, 4.0, 4.0])


def test_exported_boxes_are_those_of_the_detections(run, call, tmp_path):
    image = run.test_images / "0000.png"
    arguments = ["--weights", run.output, "--json", tmp_path / "a.json", "--input", image]
    call(export_pseudo_labels, *arguments, "--threshold", 0, "--device", "cpu")
    detector = Predictor(str(run.output), device="cpu")
    with Image.open(image) as pixels:
        (detections,) = detector.detect([np.asarray(pixels.convert("RGB"))])
    annotations = json.loads((tmp_path / "a.json").read_text())["annotations"]
    assert len(annotations) == len(detections)
    for one, (x1, y1, x2, y2) in zip(
        annotations, detections.pred_boxes.tensor.tolist(), strict=True
    ):
        assert one["bbox"] == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=0.01)
        assert math.isclose(one["area"], one["bbox"][2] * one["bbox"][3], abs_tol=0.01)
