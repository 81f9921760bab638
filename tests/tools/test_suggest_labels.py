"""The tool that suggests images to label, and training on what it writes."""

import csv
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.layers import ShapeSpec
from PIL import Image

import suggest_labels
from locreweight.engine.inference import find_inputs
from locreweight.engine.label_suggestion import assess, assess_images, image_features
from locreweight.engine.predictor import Predictor
from tests.modeling.tiny_model import random_image, write_plain_run
from tests.tiny_project import Project


@pytest.fixture(scope="module")
def detector(run):
    return Predictor(run.output, device="cpu")


@pytest.fixture
def suggest_call(run, call, tmp_path):
    """Call the tool on the tiny run; returns its exit code or message, and the output."""
    usual = ["--weights", run.output, "--device", "cpu", "--output", tmp_path / "out"]
    return lambda *arguments: call(suggest_labels, *usual, "--threshold", 0.1, *arguments)


def rows(folder):
    with (folder / "suggestions.csv").open() as file:
        return list(csv.DictReader(file))


def test_images_are_linked_and_ranked(run, suggest_call, tmp_path):
    code, printed = suggest_call("--count", 3)
    assert code == 0 and "3 of 5 images" in printed.out
    table = rows(tmp_path / "out")
    assert [row["rank"] for row in table] == ["1", "2", "3"]
    for row in table:
        assert Path(row["file"]).parent.resolve() == run.unlabeled.resolve()
        link = tmp_path / "out/images" / Path(row["file"]).name
        assert link.is_symlink() and link.resolve() == Path(row["file"]).resolve()
        assert all(0 <= float(row[name]) <= 1 for name in ("score", "classes", "boxes", "views"))
    content = json.loads((tmp_path / "out/annotations.json").read_text())
    assert len(content["images"]) == 3 and content["annotations"]
    with Image.open(tmp_path / "out/overview.jpg") as overview:
        assert overview.width > 3 * 360


def test_file_instead_of_the_output_folder_is_an_error_before_the_work(suggest_call, tmp_path):
    (tmp_path / "out").touch()
    code, _ = suggest_call("--weights", "none")
    assert code == f"error: cannot read or write {tmp_path / 'out'}: Not a directory"


@pytest.mark.parametrize("task", ["coco", "yolo"])
def test_task_can_be_trained_on_without_its_unlabeled_originals(run, suggest_call, tmp_path, task):
    """The links are recognized as the unlabeled images that they lead to."""
    code, printed = suggest_call("--count", 3, "--format", task)
    assert code == 0
    project = Project(tmp_path / "project")
    name = printed.out.split("add to DATASETS.TRAIN: ")[1].strip()
    project.set("DATASETS.TRAIN", [*project.settings["DATASETS.TRAIN"], name])
    project.set("DATASETS.UNLABELED", [f"folder:{run.unlabeled}"])
    project.set("DATASETS.EXCLUDE_LABELED", True)
    project.set("DATALOADER.FILTER_EMPTY_ANNOTATIONS", False)
    sets, _ = project.read()
    assert len(sets.labeled) == 4 + 3
    assert len(sets.unlabeled) == 5 - 3


def test_label_studio(run, suggest_call, tmp_path):
    code, printed = suggest_call("--count", 2, "--format", "label-studio", "--copy")
    assert code == 0 and "export of Label Studio" in printed.out
    tasks = json.loads((tmp_path / "out/tasks.json").read_text())
    for task in tasks:
        path = tmp_path / "out" / task["data"]["image"].split("?d=")[1]
        assert path.is_file() and not path.is_symlink()
    assert (tmp_path / "out/tasks.xml").is_file()

    model = [task["predictions"][0]["model_version"] for task in tasks]
    assert model == [f"{run.output.name}/model_best"] * 2


def test_yolo_task_with_a_name_for_two_images_writes_nothing(run, suggest_call, tmp_path):
    file = sorted(run.unlabeled.iterdir())[0]
    for suffix in (".png", ".jpg"):
        shutil.copy(file, tmp_path / f"same{suffix}")
    words = ("--input", tmp_path / "same.png", tmp_path / "same.jpg", "--format", "yolo")
    code, _ = suggest_call(*words)
    assert code.startswith("error: ") and "would have the same YOLO label file" in code
    assert not (tmp_path / "out").exists()


def test_suggestions_do_not_depend_on_the_order_of_the_images(run, call, tmp_path):
    files = sorted(run.unlabeled.iterdir())
    chosen = []
    for i, inputs in enumerate((files, files[::-1])):
        output = tmp_path / str(i)
        arguments = ["--weights", run.output, "--device", "cpu", "--output", output, "--count", 3]
        assert call(suggest_labels, *arguments, "--input", *inputs)[0] == 0
        chosen.append([Path(row["file"]).name for row in rows(output)])
    assert chosen[0] == chosen[1]


def test_plain_detectron2_run(run, call, tmp_path):
    write_plain_run(tmp_path / "plain")
    arguments = ["--weights", tmp_path / "plain", "--device", "cpu", "--threshold", 0.1]
    arguments += ["--input", run.unlabeled, "--output", tmp_path / "out", "--count", 3]
    assert call(suggest_labels, *arguments)[0] == 0
    table = rows(tmp_path / "out")
    assert len(table) == 3 and {float(row["boxes"]) for row in table} == {0.0}


@pytest.mark.parametrize("options", [(), ("DATASETS.TRAIN", "('my_images',)")])
def test_plain_detectron2_run_needs_an_input(call, tmp_path, options):
    write_plain_run(tmp_path / "plain")
    arguments = ["--weights", tmp_path / "plain", "--device", "cpu", "--output", tmp_path / "out"]
    assert "give --input" in call(suggest_labels, *arguments, *options)[0]


def test_pool_limits_the_images(suggest_call):
    assert "2 of 2 images" in suggest_call("--pool", 2)[1].out


def test_unreadable_images_are_skipped_and_listed(run, suggest_call, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    code, printed = suggest_call("--input", run.unlabeled, tmp_path / "broken.png")
    assert code == "error: 1 of 6 inputs could not be read"
    assert "broken.png" in printed.err and len(rows(tmp_path / "out")) == 5


def test_existing_output_is_not_replaced(suggest_call, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.json").touch()
    code, _ = suggest_call()
    assert "out is not empty" in code and len(list((tmp_path / "out").iterdir())) == 1


@pytest.mark.parametrize("words", [("--count", "0"), ("--threshold", "2"), ("--format", "voc")])
def test_bad_values_are_an_error(suggest_call, words):
    code, printed = suggest_call(*words)
    assert code == 2 and words[1] in printed.err


def test_uncertainty_does_not_depend_on_the_batch(run, detector):
    files = find_inputs([str(run.unlabeled)])
    one = list(assess(detector, files, 1, []))
    several = list(assess(detector, files, 3, []))
    assert [x.file for x in one] == [x.file for x in several]
    for first, second in zip(one, several, strict=True):
        assert vars(first.uncertainty) == pytest.approx(vars(second.uncertainty), abs=1e-3)
        assert first.features == pytest.approx(second.features, abs=1e-4)


def test_features_do_not_depend_on_the_size_of_other_images(detector):
    """In a batch with larger images, padding would reach them through the convolutions."""
    sizes = [(64, 64), (24, 64), (64, 30), (24, 64)]
    images = [random_image(size, seed).permute(1, 2, 0).numpy() for seed, size in enumerate(sizes)]
    together = assess_images(detector, images)
    for image, (uncertainty, features) in zip(images, together, strict=True):
        [(alone, expected)] = assess_images(detector, [image])
        assert features == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert vars(uncertainty) == pytest.approx(vars(alone), abs=1e-3)


def test_features_leave_out_the_padding():
    shapes = {"p2": ShapeSpec(channels=1, stride=4), "p3": ShapeSpec(channels=1, stride=8)}
    sizes = {name: (1, 1, 64 // x.stride, 32 // x.stride) for name, x in shapes.items()}
    maps = {name: torch.full(size, 9.0) for name, size in sizes.items()}
    maps["p2"][0, :, :10, :5] = 1.0
    maps["p3"][0, :, :5, :3] = 2.0
    assert image_features(maps, shapes, (40, 20)).tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize("task", ["coco", "label-studio"])
def test_names_that_are_not_utf8_are_written(run, suggest_call, tmp_path, task):
    folder = tmp_path / "photos"
    folder.mkdir()
    image = sorted(run.unlabeled.iterdir())[0].read_bytes()
    (folder / os.fsdecode(b"a\xff.png")).write_bytes(image)
    assert suggest_call("--input", folder, "--format", task)[0] == 0
    assert b"a\xff.png" in (tmp_path / "out" / "suggestions.csv").read_bytes()
    if task == "label-studio":
        [written] = json.loads((tmp_path / "out" / "tasks.json").read_text())
        assert written["data"]["image"].endswith("?d=images/a%FF.png")


def test_symmetric_image_gives_views_that_agree(run, detector):
    image = detector(sorted(run.unlabeled.iterdir())[0]).image.copy()
    image[:, 32:] = image[:, 31::-1]
    (uncertainty, features), (other, mirrored) = assess_images(
        detector, [image, image[:, ::-1].copy()]
    )
    assert vars(uncertainty) == pytest.approx(vars(other), abs=1e-6)
    assert features == pytest.approx(mirrored, abs=1e-6)
