"""tools/check_data.py finds the problems that are planted, and nothing in valid data."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

import check_data
from locreweight.config import load_config
from locreweight.data.inspection.findings import Severity
from locreweight.data.inspection.images import read_facts
from locreweight.engine import data_report
from locreweight.errors import UsageError
from tests.checked_data import BASE, Project
from tests.tiny_data import CLASSES, edit_json, make_voc
from tests.tiny_formats import as_labelme


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def test_valid_data_have_no_findings(project):
    assert project.findings() == []


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("UNLABELED", ["folder:a", "folder:a"], "contains 'folder:a' more than once"),
        ("CLASS_NAMES", [0, 1, 2], "contains 0: use a text in quotes"),
    ],
)
def test_names_that_cannot_be_used_are_reported(project, key, value, problem):
    project.settings[f"DATASETS.{key}"] = value
    with pytest.raises(UsageError, match=f"DATASETS.{key} {problem}"):
        project.report()


def test_report_shows_overview_and_training_command(project, capsys):
    with pytest.raises(SystemExit) as exit_:
        check_data.main(["--num-gpus", "2", *project.arguments])
    assert exit_.value.code == 0
    output = capsys.readouterr().out
    _, _, command = output.partition("to train:\n  ")
    words = shlex.split(command.splitlines()[0])
    assert words[:4] == ["python", "train_net.py", "--num-gpus", "2"]
    assert words[4:] == project.arguments
    cfg = load_config(BASE, words[6:])
    assert list(cfg.DATASETS.UNLABELED) == project.settings["DATASETS.UNLABELED"]
    assert "| labeled " in output and "96 / 96 / 96" in output and "4 / 4 / 4" in output
    assert "5 labeled images" in output and "4 unlabeled images" in output and "GiB" in output


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"MODEL.ROI_HEADS.NUM_CLASSES": 7}, "to train:"),
        ({"MODEL.WEIGHTS": "/no.pth"}, "to train, once the errors are fixed:"),
    ],
)
def test_command_of_a_training_that_would_not_start(project, capsys, settings, line):
    project.settings |= settings
    with pytest.raises(SystemExit):
        check_data.main(project.arguments)
    assert f"\n{line}\n  python train_net.py" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "warning"),
    [
        ({"SOLVER.WARMUP_ITERS": 5000, "SOLVER.MAX_ITER": 5000}, "SOLVER.WARMUP_ITERS 5000 is not"),
        ({"SOLVER.WARMUP_ITERS": 4999, "SOLVER.MAX_ITER": 5000}, None),
        ({"SEMI.BURN_IN_ITERS": 180_000}, "unlabeled images are not used: SEMI.BURN_IN_ITERS"),
        ({"SEMI.BURN_IN_ITERS": 180_000, "DATASETS.UNLABELED": ()}, None),
        # keep_rate() reaches 0.9996 after 2499 iterations.
        ({"SOLVER.MAX_ITER": 4400}, "EMA_KEEP_RATE 0.9996 is too high for 2400 .* at most 0.999"),
        ({"SOLVER.MAX_ITER": 3000}, "EMA_KEEP_RATE 0.9996 is too high for 1000 .* at most 0.99"),
        ({"SOLVER.MAX_ITER": 4600}, None),
        ({"SOLVER.MAX_ITER": 3000, "SEMI.EMA_KEEP_RATE": 0.999}, None),
        ({"SOLVER.MAX_ITER": 2050, "SEMI.EMA_KEEP_RATE": 0.99}, None),
    ],
)
def test_schedules_that_do_not_fit(project, settings, warning):
    project.settings |= settings
    texts = project.texts(Severity.WARNING)
    assert len(texts) == (warning is not None)
    assert warning is None or re.search(warning, texts[0])


def test_supervised_training_uses_no_unlabeled_images_on_purpose(project):
    report = data_report.check_data(
        lambda options: load_config(BASE, options, "supervised"), project.options, num_gpus=2
    )
    assert report.findings == []


def test_overview_of_a_partly_annotated_folder(project, capsys):
    name = as_labelme(project.folder / "labeled", project.folder / "partly")
    for annotation in sorted((project.folder / "partly").glob("*.json"))[2:]:
        annotation.unlink()
    project.settings |= {"DATASETS.UNLABELED": [name], "DATASETS.CLASS_NAMES": CLASSES}
    with pytest.raises(SystemExit):
        check_data.main(project.arguments)
    assert "4 / 4 / 4, 3 images not annotated" in capsys.readouterr().out


def test_unreadable_images(project):
    for folder in (project.images, project.unlabeled):
        (folder / "0001.png").write_bytes((folder / "0001.png").read_bytes()[:200])
    by_severity = {f.severity: f for f in project.findings()}
    error, warning = by_severity[Severity.ERROR], by_severity[Severity.WARNING]
    assert "1 of 5 images cannot be read" in error.text
    assert error.files == [str(project.images / "0001.png")]
    assert warning.files == [str(project.unlabeled / "0001.png")]  # training skips these


@pytest.mark.parametrize(
    ("available", "requested", "expected", "fixed"),
    [
        (0, 1, "no GPU", {"MODEL.DEVICE", "SOLVER.AMP.ENABLED"}),
        (1, 2, "--num-gpus is 2, but this machine has 1 GPU;", set()),
    ],
)
def test_missing_gpus(monkeypatch, available, requested, expected, fixed):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: available)
    cfg = load_config(BASE, ["MODEL.DEVICE", "cuda"])
    (finding,) = data_report._device_findings(cfg, requested)
    assert finding.severity is Severity.WARNING
    assert expected in finding.text and set(finding.fixes) == fixed


@pytest.mark.parametrize(("device", "available"), [("cuda", 2), ("cuda", 3), ("cpu", 0)])
def test_available_devices(monkeypatch, device, available):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: available)
    assert data_report._device_findings(load_config(BASE, ["MODEL.DEVICE", device]), 2) == []


def test_frozen_random_backbone():
    cfg = load_config(BASE, ["MODEL.WEIGHTS", ""])
    (finding,) = data_report._random_weight_findings(cfg)
    assert finding.severity is Severity.WARNING
    cfg.merge_from_list([word for pair in finding.fixes.items() for word in pair])
    assert data_report._random_weight_findings(cfg) == []


def rotate(file):
    """Store the image rotated, with the EXIF orientation that says so."""
    with Image.open(file) as image:
        stored = image.resize((64, 32))
        exif = Image.Exif()
        exif[0x0112] = 6
        stored.save(file, exif=exif)


def test_rotated_images(project):
    rotate(project.unlabeled / "0002.png")
    (note,) = project.findings()
    assert note.severity is Severity.NOTE
    assert "rotated by their EXIF" in note.text
    assert note.files == [str(project.unlabeled / "0002.png")]
    facts = read_facts(note.files[0])
    assert facts.rotated and facts.size == (32, 64)


def test_annotations_of_the_unrotated_image(project):
    rotate(project.images / "0000.png")
    edit_json(
        project.json, lambda content: content["images"][0].update(width=64, height=32) or None
    )
    (error,) = (f for f in project.findings() if f.severity is Severity.ERROR)
    assert "have another width and height" in error.text
    assert error.files == [str(project.images / "0000.png")]


def test_unusable_boxes(project):
    def spoil(content):
        content["annotations"][0]["bbox"] = [1, 2, 0, 5]
        content["annotations"][1]["bbox"] = [500, 2, 5, 5]

    edit_json(project.json, spoil)
    texts = project.texts(Severity.WARNING)
    assert any("would leave out 1 boxes that have no area" in text for text in texts)
    assert any("would leave out 1 boxes that lie outside" in text for text in texts)


def test_malformed_boxes_have_a_fix(project):
    edit_json(project.json, lambda c: c["annotations"][0].update(bbox=[9, 9, -5, 5]) or None)
    (error,) = project.findings()
    assert error.severity is Severity.ERROR and "inverted" in error.text
    assert error.fixes == {"DATASETS.CHECKS.DROP_BAD_BOXES": "True"}


def test_no_usable_box(project):
    edit_json(
        project.json, lambda c: [a.update(bbox=[1, 1, 0, 0]) for a in c["annotations"]] and None
    )
    assert any("no box could be trained on" in text for text in project.texts(Severity.ERROR))


def test_crowds_are_counted(project):
    def edit(content):
        for annotation in content["annotations"][:3]:
            annotation["iscrowd"] = 1

    edit_json(project.json, edit)
    edit_json(project.test_json, edit)
    notes = project.texts(Severity.NOTE)
    assert any("3 of 20 boxes" in text and "not trained on" in text for text in notes)
    assert any("3 of 12 boxes" in text and "ignored in evaluation" in text for text in notes)


def test_a_test_set_of_crowds_alone(project):
    edit_json(project.test_json, lambda c: [a.update(iscrowd=1) for a in c["annotations"]] and None)
    texts = project.texts(Severity.ERROR)
    assert any("no box could be evaluated on" in text for text in texts)


def test_no_number_of_classes_is_advised_while_the_sets_differ(project):
    """The sets have 3 and 2 classes: any advice would be refused by one of them."""

    def edit(content):
        content["categories"].pop()
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] < 3]

    edit_json(project.test_json, edit)
    for count in ("2", "3", "80"):
        project.settings["MODEL.ROI_HEADS.NUM_CLASSES"] = count
        findings = project.findings()
        assert not any("NUM_CLASSES" in str(finding.fixes) for finding in findings)
        assert any("it lacks 'owl'" in finding.text for finding in findings)


def test_wrong_number_of_classes_has_a_fix(project):
    project.settings["MODEL.ROI_HEADS.NUM_CLASSES"] = 7
    (error,) = project.findings()
    assert "have 3 classes, MODEL.ROI_HEADS.NUM_CLASSES is 7" in error.text
    assert error.fixes == {"MODEL.ROI_HEADS.NUM_CLASSES": "3"}


def test_other_class_names_in_the_test_set(project):
    edit_json(project.test_json, lambda c: c["categories"][1].update(name="wolf") or None)
    (error,) = project.texts(Severity.ERROR)
    assert "do not have the same classes" in error and "wolf" in error


def test_names_of_the_config_are_compared_with_those_of_a_coco_file(project):
    project.settings["DATASETS.CLASS_NAMES"] = ["cat", "dgo", "owl"]
    (error,) = project.texts(Severity.ERROR)
    assert "DATASETS.CLASS_NAMES: 'cat', 'dgo', 'owl'; it lacks 'dog'" in error
    project.settings["DATASETS.CLASS_NAMES"] = ["cat", "dog", "owl"]
    assert project.texts(Severity.ERROR) == []


def test_class_without_boxes(project):
    edit_json(project.json, lambda c: [a.update(category_id=1) for a in c["annotations"]] and None)
    (text,) = (t for t in project.texts(Severity.WARNING) if "coco:" in t and "labeled" in t)
    assert "has no box of the classes dog, owl" in text


def test_wrong_class_names_have_a_fix(project):
    """By default, VOC's twenty classes are expected. The printed command has the right ones."""
    voc = make_voc(project.folder / "voc", images=3, classes=("RBC", "WBC"))
    project.settings |= {
        "DATASETS.TRAIN": [f"voc:{voc}:trainval"],
        "DATASETS.TEST": (),
        "MODEL.ROI_HEADS.NUM_CLASSES": 20,
    }
    (error,) = (f for f in project.findings() if f.severity is Severity.ERROR)
    assert "RBC, WBC" in error.text and "no box would be used" in error.text
    words = data_report._apply_fixes(project.options, [error])
    cfg = load_config("", words)
    assert tuple(cfg.DATASETS.CLASS_NAMES) == ("RBC", "WBC")
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2


def voc_set(project, name, classes):
    return f"voc:{make_voc(project.folder / name, images=3, classes=classes)}:trainval"


def test_classes_of_unlabeled_images_are_not_suggested(project):
    project.settings["DATASETS.UNLABELED"] = [voc_set(project, "voc", ("bird",))]
    assert not any(finding.fixes for finding in project.findings())


def class_errors(project, train, test):
    """Findings about class names of VOC sets with these classes."""
    project.settings |= {
        "DATASETS.TRAIN": [voc_set(project, "train", train)],
        "DATASETS.TEST": [voc_set(project, "val", test)],
    }
    return [f for f in project.findings() if "its annotations have the classes" in f.text]


def test_suggested_class_names_cover_labeled_and_test_images(project):
    errors = class_errors(project, ("ant", "bee"), ("bee", "cow"))
    assert len(errors) == 2
    for error in errors:
        assert error.fixes == {
            "DATASETS.CLASS_NAMES": '("ant","bee","cow",)',
            "MODEL.ROI_HEADS.NUM_CLASSES": "3",
        }


def test_suggested_class_names_of_unusual_image_lists(project):
    """The list has a byte order mark, and the names of its images have spaces."""
    name = voc_set(project, "voc", ("ant", "bee"))
    folder = Path(name.split(":")[1])
    for file in [*folder.glob("Annotations/*"), *folder.glob("JPEGImages/*")]:
        file.rename(file.with_name(f"photo {file.name}"))
    (folder / "ImageSets/Main/trainval.txt").write_text(
        "".join(f"photo {i:04d}\n" for i in range(3)), encoding="utf-8-sig"
    )
    project.settings |= {"DATASETS.TRAIN": [name], "DATASETS.TEST": []}
    (error,) = (f for f in project.findings() if f.severity is Severity.ERROR)
    assert error.fixes["DATASETS.CLASS_NAMES"] == '("ant","bee",)'


def test_class_names_that_differ_only_in_case_have_no_fix(project):
    errors = class_errors(project, ("Ant", "bee"), ("ant", "bee"))
    assert len(errors) == 2
    for error in errors:
        assert not error.fixes
        assert "Ant, ant differ only in case" in error.text


@pytest.mark.parametrize(("classes", "has_fix"), [(("dog", "owl"), True), (("cat", "ox"), False)])
def test_suggested_class_names_follow_a_coco_set(project, classes, has_fix):
    """The json defines its classes and their order; the other sets must have the same."""
    project.settings["DATASETS.TEST"] = [voc_set(project, "val", classes)]
    (error,) = (f for f in project.findings() if "its annotations have" in f.text)
    if has_fix:
        assert error.fixes["DATASETS.CLASS_NAMES"] == '("cat","dog","owl",)'
    else:
        assert not error.fixes and "has the classes cat, dog, owl" in error.text


def test_unreadable_data_set_does_not_hide_other_findings(project):
    project.json.write_text("{")
    rotate(project.unlabeled / "0002.png")
    severities = [finding.severity for finding in project.findings()]
    assert Severity.ERROR in severities and Severity.NOTE in severities


def test_unwritable_list_file(project, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        check_data.main(["--list", str(tmp_path), *project.arguments])
    assert exit_.value.code == f"error: cannot read or write {tmp_path}: Is a directory"
    assert "0 errors, 0 warnings" in capsys.readouterr().out


def test_list_file_has_all_files(project, tmp_path):
    for name in ("0000.png", "0001.png", "0002.png", "0003.png"):
        rotate(project.unlabeled / name)
    file = tmp_path / "list.txt"
    with pytest.raises(SystemExit):
        check_data.main(["--list", str(file), *project.arguments])
    assert sum("unlabeled/" in line for line in file.read_text().splitlines()[1:]) >= 4


def test_config_error_is_one_line(capsys):
    with pytest.raises(SystemExit) as exit_:
        check_data.main(["SEMI.BURNIN", "1"])
    assert exit_.value.code.startswith("error: unknown config key SEMI.BURNIN")
