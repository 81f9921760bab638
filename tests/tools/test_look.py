"""Views, comparisons, exported pseudo-labels: what is drawn and written is right."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

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
from locreweight.engine.predictor import load_predictor
from tests.modeling.tiny_model import TINY, as_options

BASE = Path(__file__).parents[2] / "configs/Base-LocReweight.yaml"


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs a tool; returns its exit code or message, and what it printed."""

    def call(tool, *arguments):
        monkeypatch.setattr(sys, "argv", [tool.__name__, *map(str, arguments)])
        try:
            tool.main()
        except SystemExit as end:
            return end.code, capsys.readouterr()
        return 0, capsys.readouterr()

    return call


def size_of(file):
    with Image.open(file) as image:
        return image.size


# --- views ----------------------------------------------------------------------------------------


def config_options(run):
    return ["--config-file", BASE], as_options(
        TINY | {"MODEL.RESNETS.NORM": "BN", "DATASETS.TRAIN": (run.test_set,)}
    )


def test_views_before_training(run, call, tmp_path):
    config, options = config_options(run)
    code, printed = call(
        show_views, *config, "--output", tmp_path / "v.jpg", "--count", 2, *options
    )
    assert code == 0 and "2 images" in printed.out
    assert size_of(tmp_path / "v.jpg")[0] > 2 * 400


def test_views_of_given_images_and_a_trained_student(run, call, tmp_path):
    """Those that no data set knows have no truth, and are shown all the same."""
    config, options = config_options(run)
    inputs = ["--input", run.unlabeled / "0000.png", run.test_images / "0001.png"]
    weights = ["--weights", run.output]
    code, printed = call(
        show_views, *config, *inputs, *weights, "--output", tmp_path / "v.png", *options
    )
    assert code == 0 and "2 images" in printed.out


def test_no_other_image_is_shown_for_one_that_cannot_be_read(run, call, tmp_path):
    config, options = config_options(run)
    (tmp_path / "broken.png").write_bytes(b"no image")
    inputs = ["--input", tmp_path / "broken.png", run.test_images / "0001.png"]
    code, _ = call(show_views, *config, *inputs, "--output", tmp_path / "v.png", *options)
    assert "broken.png" in code and not (tmp_path / "v.png").exists()


@pytest.mark.parametrize("tool", [show_views, compare_detections, plot_localization_quality])
@pytest.mark.parametrize("name", ["views", "views.foo"])
def test_a_picture_without_a_format_is_told_before_the_work(call, tool, name):
    code, printed = call(tool, "--config-file", "a", "--weights", "b", "--output", name)
    assert code == 2 and f"{name} is no name of a" in printed.err


# --- side by side ---------------------------------------------------------------------------------


def test_checkpoints_side_by_side(run, call, tmp_path):
    files = [run.output / name for name in ("model_best.pth", "model_final.pth")]
    arguments = ["--weights", *files, "--output", tmp_path / "c.png", "--count", 2]
    assert call(compare_detections, *arguments)[0] == 0
    width, height = size_of(tmp_path / "c.png")
    cell = compare_detections.SIDE + 4
    assert width == 3 * cell and height == 2 * (cell + 22)


def test_an_image_of_another_set_cannot_be_compared(run, call, tmp_path):
    code, _ = call(
        compare_detections,
        *("--weights", run.output, "--output", tmp_path / "c.png"),
        *("--input", run.unlabeled / "0000.png"),
    )
    assert "is not in the data set" in code


# --- export ---------------------------------------------------------------------------------------


def test_exported_pseudo_labels_are_a_coco_data_set(run, call, tmp_path):
    file = tmp_path / "labels.json"
    code, printed = call(
        export_pseudo_labels, "--weights", run.output, "--json", file, "--device", "cpu"
    )
    assert code == 0
    name = printed.out.split("as a data set: ")[1].strip()
    assert name == f"coco:{file}:{run.unlabeled}"
    records = load_coco("exported", str(file), str(run.unlabeled))
    assert len(records) == 5 and all(Path(r["file_name"]).is_file() for r in records)
    detector = load_predictor(str(run.output), device="cpu")
    threshold = detector.cfg.SEMI.PSEUDO_LABEL_THRESHOLD
    annotations = json.loads(file.read_text())["annotations"]
    assert annotations and all(a["score"] > threshold for a in annotations)
    assert len(annotations) == sum(len(record["annotations"]) for record in records)


@pytest.mark.parametrize(("has_localization_quality", "expected"), [(True, 0.25), (False, None)])
def test_a_quality_that_no_detector_learned_is_not_exported(
    tmp_path, has_localization_quality, expected
):
    found = Instances((8, 8), pred_boxes=Boxes(torch.tensor([[1.0, 2, 5, 6]])))
    found.pred_classes, found.scores = torch.tensor([0]), torch.tensor([0.9])
    found.localization_quality = torch.tensor([0.25])
    seen = SimpleNamespace(
        file=SimpleNamespace(path=tmp_path / "a.png"), image=np.zeros((8, 8, 3)), found=found
    )
    content = export_pseudo_labels.as_coco(
        [seen], ["cell"], 0.5, tmp_path, has_localization_quality=has_localization_quality
    )
    assert [a["localization_quality"] for a in content["annotations"]] == [expected]


def test_exported_boxes_are_the_detections(run, call, tmp_path):
    image = run.test_images / "0000.png"
    arguments = ["--weights", run.output, "--json", tmp_path / "a.json", "--input", image]
    call(export_pseudo_labels, *arguments, "--threshold", 0, "--device", "cpu")
    detector = load_predictor(str(run.output), device="cpu")
    with Image.open(image) as pixels:
        (found,) = detector.detect([np.asarray(pixels.convert("RGB"))])
    annotations = json.loads((tmp_path / "a.json").read_text())["annotations"]
    assert len(annotations) == len(found)
    for one, (x1, y1, x2, y2) in zip(annotations, found.pred_boxes.tensor.tolist(), strict=True):
        assert one["bbox"] == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=0.01)
        assert math.isclose(one["area"], one["bbox"][2] * one["bbox"][3], abs_tol=0.01)
