"""Data that are looked at before training: what is planted is found, what is in order is not."""

from __future__ import annotations

import shlex

import pytest
import torch
from PIL import Image

import check_data
from locreweight.config import load_config
from locreweight.data.inspection.findings import Severity
from locreweight.data.inspection.images import read_facts
from tests.checked_data import BASE, Project
from tests.tiny_data import edit_json, make_voc


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def test_data_in_order_have_no_findings(project):
    assert project.findings() == []


def test_the_report_ends_with_the_command_to_train(project, capsys):
    with pytest.raises(SystemExit) as exit_:
        check_data.main(["--num-gpus", "2", *project.words])
    assert exit_.value.code == 0
    said = capsys.readouterr().out
    _, _, command = said.partition("to train:\n  ")
    words = shlex.split(command.splitlines()[0])
    assert words[:4] == ["python", "train_net.py", "--num-gpus", "2"]
    assert words[4:] == project.words
    cfg = load_config(BASE, words[6:])
    assert list(cfg.DATASETS.UNLABELED) == project.settings["DATASETS.UNLABELED"]
    assert "| labeled " in said and "96 / 96 / 96" in said and "4 / 4 / 4" in said
    assert "5 labeled images" in said and "4 unlabeled images" in said and "GiB" in said


def test_unreadable_images_are_found(project):
    for folder in (project.images, project.unlabeled):
        (folder / "0001.png").write_bytes((folder / "0001.png").read_bytes()[:200])
    by_severity = {f.severity: f for f in project.findings()}
    error, warning = by_severity[Severity.ERROR], by_severity[Severity.WARNING]
    assert "1 images cannot be read" in error.text
    assert error.files == [str(project.images / "0001.png")]
    assert warning.files == [str(project.unlabeled / "0001.png")]  # training skips these


@pytest.mark.parametrize(
    ("there", "asked", "expected", "fixed"),
    [
        (0, 1, "no GPU", {"MODEL.DEVICE", "SOLVER.AMP.ENABLED"}),
        (1, 2, "2 GPUs are asked for and 1 are here", set()),
    ],
)
def test_gpus_that_are_not_there_are_missed(monkeypatch, there, asked, expected, fixed):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    cfg = load_config(BASE, ["MODEL.DEVICE", "cuda"])
    (finding,) = check_data.device_findings(cfg, asked)
    assert finding.severity is Severity.WARNING
    assert expected in finding.text and set(finding.fixes) == fixed


@pytest.mark.parametrize(("device", "there"), [("cuda", 2), ("cuda", 3), ("cpu", 0)])
def test_devices_that_are_there_are_no_finding(monkeypatch, device, there):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    assert check_data.device_findings(load_config(BASE, ["MODEL.DEVICE", device]), 2) == []


def test_a_backbone_that_stays_at_random_is_found():
    cfg = load_config(BASE, ["MODEL.WEIGHTS", ""])
    (finding,) = check_data.random_findings(cfg)
    assert finding.severity is Severity.WARNING
    cfg.merge_from_list([word for pair in finding.fixes.items() for word in pair])
    assert check_data.random_findings(cfg) == []


def rotate(file):
    """The picture lies on its side in the file, and EXIF says so."""
    with Image.open(file) as image:
        stored = image.resize((64, 32))
        exif = Image.Exif()
        exif[0x0112] = 6
        stored.save(file, exif=exif)


def test_rotated_images_are_told_of(project):
    rotate(project.unlabeled / "0002.png")
    (note,) = project.findings()
    assert note.severity is Severity.NOTE
    assert "turned by their EXIF" in note.text
    assert note.files == [str(project.unlabeled / "0002.png")]
    facts = read_facts(note.files[0])
    assert facts.rotated and facts.size == (32, 64)


def test_annotations_of_the_image_before_its_rotation_are_an_error(project):
    rotate(project.images / "0000.png")
    edit_json(
        project.json, lambda content: content["images"][0].update(width=64, height=32) or None
    )
    (error,) = (f for f in project.findings() if f.severity is Severity.ERROR)
    assert "do not have the width and height" in error.text
    assert error.files == [str(project.images / "0000.png")]


def test_boxes_that_cannot_be_used_are_told_of(project):
    def spoil(content):
        content["annotations"][0]["bbox"] = [1, 2, 0, 5]
        content["annotations"][1]["bbox"] = [500, 2, 5, 5]

    edit_json(project.json, spoil)
    texts = project.texts(Severity.WARNING)
    assert any("left out 1 boxes that have no area" in text for text in texts)
    assert any("left out 1 boxes that lie outside" in text for text in texts)


def test_malformed_boxes_are_an_error_that_a_key_mends(project):
    edit_json(project.json, lambda c: c["annotations"][0].update(bbox=[9, 9, -5, 5]) or None)
    (error,) = project.findings()
    assert error.severity is Severity.ERROR and "inverted" in error.text
    assert error.fixes == {"DATASETS.CHECKS.DROP_BAD_BOXES": "True"}


def test_no_box_at_all_is_an_error(project):
    edit_json(
        project.json, lambda c: [a.update(bbox=[1, 1, 0, 0]) for a in c["annotations"]] and None
    )
    assert any("no box would be used" in text for text in project.texts(Severity.ERROR))


def test_another_number_of_classes_is_mended_by_a_key(project):
    project.settings["MODEL.ROI_HEADS.NUM_CLASSES"] = 7
    (error,) = project.findings()
    assert "have 3 classes, MODEL.ROI_HEADS.NUM_CLASSES is 7" in error.text
    assert error.fixes == {"MODEL.ROI_HEADS.NUM_CLASSES": "3"}


def test_other_class_names_in_the_test_set_are_an_error(project):
    edit_json(project.test_json, lambda c: c["categories"][1].update(name="wolf") or None)
    (error,) = project.texts(Severity.ERROR)
    assert "do not have the same classes" in error and "wolf" in error


def test_a_class_without_a_box_is_told_of(project):
    edit_json(project.json, lambda c: [a.update(category_id=1) for a in c["annotations"]] and None)
    (text,) = (t for t in project.texts(Severity.WARNING) if "coco:" in t and "labeled" in t)
    assert "has no box of the classes dog, owl" in text


def test_class_names_that_no_annotation_uses_are_an_error_that_a_key_mends(project):
    """Pascal VOC's twenty are expected, and are not there; the command at the end is in order."""
    voc = make_voc(project.folder / "voc", images=3, classes=("RBC", "WBC"))
    project.settings |= {
        "DATASETS.TRAIN": [f"voc:{voc}:trainval"],
        "DATASETS.TEST": (),
        "MODEL.ROI_HEADS.NUM_CLASSES": 20,
    }
    (error,) = (f for f in project.findings() if f.severity is Severity.ERROR)
    assert "RBC, WBC" in error.text and "no box would be used" in error.text
    words = check_data.with_fixes(project.arguments().opts, [error])
    cfg = load_config("", words)
    assert tuple(cfg.DATASETS.CLASS_NAMES) == ("RBC", "WBC")
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2


def voc_set(project, name, classes):
    return f"voc:{make_voc(project.folder / name, images=3, classes=classes)}:trainval"


def test_annotations_of_unlabeled_images_suggest_no_classes(project):
    project.settings["DATASETS.UNLABELED"] = [voc_set(project, "voc", ("bird",))]
    assert not any(finding.fixes for finding in project.findings())


def class_errors(project, train, test):
    """Errors of data sets that the class names of the config do not fit."""
    project.settings |= {
        "DATASETS.TRAIN": [voc_set(project, "train", train)],
        "DATASETS.TEST": [voc_set(project, "val", test)],
    }
    return [f for f in project.findings() if "its annotations name the classes" in f.text]


def test_class_names_that_mend_are_those_of_labeled_and_test_images_together(project):
    errors = class_errors(project, ("ant", "bee"), ("bee", "cow"))
    assert len(errors) == 2
    for error in errors:
        assert error.fixes == {
            "DATASETS.CLASS_NAMES": '("ant","bee","cow",)',
            "MODEL.ROI_HEADS.NUM_CLASSES": "3",
        }


def test_class_names_that_differ_only_in_case_are_not_mended(project):
    errors = class_errors(project, ("Ant", "bee"), ("ant", "bee"))
    assert len(errors) == 2
    for error in errors:
        assert not error.fixes
        assert "Ant, ant differ only in case" in error.text


@pytest.mark.parametrize(("classes", "mended"), [(("dog", "owl"), True), (("cat", "ox"), False)])
def test_class_names_that_mend_are_those_of_a_coco_set_beside_them(project, classes, mended):
    """Its classes are in its json: the other sets are asked for the same ones, in that order."""
    project.settings["DATASETS.TEST"] = [voc_set(project, "val", classes)]
    (error,) = (f for f in project.findings() if "its annotations name" in f.text)
    if mended:
        assert error.fixes["DATASETS.CLASS_NAMES"] == '("cat","dog","owl",)'
    else:
        assert not error.fixes and "has the classes cat, dog, owl" in error.text


def test_what_cannot_be_read_at_all_does_not_hide_the_rest(project):
    project.json.write_text("{")
    rotate(project.unlabeled / "0002.png")
    severities = [finding.severity for finding in project.findings()]
    assert Severity.ERROR in severities and Severity.NOTE in severities


def test_a_list_that_cannot_be_written_is_told_in_one_line_after_the_report(
    project, tmp_path, capsys
):
    with pytest.raises(SystemExit) as exit_:
        check_data.main(["--list", str(tmp_path), *project.words])
    assert exit_.value.code == f"error: cannot write {tmp_path}: Is a directory"
    assert "0 errors, 0 warnings" in capsys.readouterr().out


def test_the_list_names_all_files(project, tmp_path):
    for name in ("0000.png", "0001.png", "0002.png", "0003.png"):
        rotate(project.unlabeled / name)
    file = tmp_path / "list.txt"
    with pytest.raises(SystemExit):
        check_data.main(["--list", str(file), *project.words])
    assert sum("unlabeled/" in line for line in file.read_text().splitlines()[1:]) >= 4


def test_a_mistake_in_the_config_is_told_in_one_line(capsys):
    with pytest.raises(SystemExit) as exit_:
        check_data.main(["SEMI.BURNIN", "1"])
    assert exit_.value.code.startswith("error: unknown config key SEMI.BURNIN")
