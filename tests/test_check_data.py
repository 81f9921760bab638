"""Data that are looked at before training: what is planted is found, what is in order is not."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_data import edit_json, make_coco, make_folder, make_voc

import check_data
from data_sets import Severity
from image_survey import copies_between, copies_within, read_facts, survey
from locreweight.config import load_config
from memory_estimate import estimate_memory
from tests.modeling.tiny_model import TINY, as_options, tiny_config

BASE = str(Path(__file__).parents[1] / "configs/Base-LocReweight.yaml")
SIDE = 96


class Project:
    """Data in order, and the words that name them; tests spoil one thing."""

    def __init__(self, folder):
        self.folder = folder
        self.json, self.images = make_coco(folder / "labeled", 5, 4, size=SIDE, seed=1)
        self.test_json, self.test_images = make_coco(folder / "test", 3, 4, size=SIDE, seed=2)
        self.unlabeled = make_folder(folder / "unlabeled", images=4, size=SIDE, seed=3)
        for i, image in enumerate(sorted(folder.rglob("*.png"))):
            paint(image, seed=i)
        self.settings = TINY | {
            "DATASETS.TRAIN": [f"coco:{self.json}:{self.images}"],
            "DATASETS.TEST": [f"coco:{self.test_json}:{self.test_images}"],
            "DATASETS.UNLABELED": [f"folder:{self.unlabeled}"],
        }

    def arguments(self, *flags):
        return check_data.parse_arguments([*flags, *self.words])

    @property
    def words(self):
        return ["--config-file", BASE, *as_options(self.settings)]

    def findings(self):
        return check_data.check(self.arguments())

    def texts(self, severity):
        return [finding.text for finding in self.findings() if finding.severity is severity]


def paint(file, seed):
    """Broad strokes, so that two pictures do not look alike."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file)


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


def copy_of(source, target, how):
    with Image.open(source) as image:
        if how == "content":
            target.with_suffix(".png").write_bytes(source.read_bytes())
        elif how == "compressed":
            image.convert("RGB").save(target.with_suffix(".jpg"), quality=50)
        else:
            image.resize((SIDE // 2, SIDE // 2)).save(target.with_suffix(".png"))


@pytest.mark.parametrize("how", ["content", "compressed", "halved"])
def test_test_images_hidden_among_the_unlabeled_ones_are_found(project, how):
    copy_of(project.test_images / "0001.png", project.unlabeled / "hidden", how)
    (found,) = project.findings()
    assert found.severity is (Severity.ERROR if how == "content" else Severity.WARNING)
    assert "1 unlabeled images are test images as well" in found.text
    (pair,) = found.files
    assert "unlabeled/hidden." in pair and pair.endswith(f"= {project.test_images / '0001.png'}")


def test_copies_among_labeled_images_and_within_a_set_are_found(project):
    copy_of(project.images / "0000.png", project.unlabeled / "again", "content")
    copy_of(project.unlabeled / "0003.png", project.unlabeled / "twice", "content")
    texts = project.texts(Severity.WARNING)
    assert len(texts) == 2
    assert "1 unlabeled images are labeled images as well (the same file content)" in texts[0]
    assert "1 unlabeled images are there more than once (the same file content)" in texts[1]


def test_the_very_files_of_another_set_are_mended_by_a_key(project):
    project.settings["DATASETS.UNLABELED"].append(f"folder:{project.images}")
    (error,) = project.findings()
    assert "5 unlabeled images are the very files of the labeled ones" in error.text
    assert error.fixes == {"DATASETS.EXCLUDE_LABELED": "True"}
    project.settings["DATASETS.EXCLUDE_LABELED"] = True
    assert project.findings() == []


def test_labeled_images_that_are_the_very_files_of_the_test_set_are_an_error(project):
    project.settings["DATASETS.TEST"] = project.settings["DATASETS.TRAIN"]
    (error,) = project.findings()
    assert error.severity is Severity.ERROR
    assert "5 labeled images are the very files of the test ones" in error.text
    assert len(error.files) == 5 and error.files[0] == str(project.images / "0000.png")


def list_again(content):
    content["images"].append(content["images"][0] | {"id": 99})


def test_a_file_that_is_listed_twice_is_told_of(project):
    edit_json(project.json, list_again)
    (warning,) = project.findings()
    assert warning.severity is Severity.WARNING
    assert "1 entries of the labeled images name a file that another one names" in warning.text
    assert warning.files == [str(project.images / "0000.png")]


def test_a_file_of_two_data_sets_and_a_link_to_one_are_told_of(project):
    second = project.json.with_name("second.json")
    second.write_text(project.json.read_text())
    project.settings["DATASETS.TRAIN"].append(f"coco:{second}:{project.images}")
    (project.unlabeled / "link.png").symlink_to(project.unlabeled / "0001.png")
    texts = project.texts(Severity.WARNING)
    assert [text.partition(" name a file")[0] for text in texts] == [
        "5 entries of the labeled images",
        "1 entries of the unlabeled images",
    ]


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
    assert error.fixes == {"DATASETS.DROP_BAD_BOXES": "True"}


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
    assert "do not name the same classes" in error and "wolf" in error


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


def test_what_cannot_be_read_at_all_does_not_hide_the_rest(project):
    project.json.write_text("{")
    rotate(project.unlabeled / "0002.png")
    severities = [finding.severity for finding in project.findings()]
    assert Severity.ERROR in severities and Severity.NOTE in severities


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


# --- copies ---------------------------------------------------------------------------------------


def test_pictures_that_differ_are_no_copies(tmp_path):
    for seed in range(60):
        paint(tmp_path / f"{seed:02d}.png", seed)
    facts = list(survey(sorted(map(str, tmp_path.iterdir()))).values())
    assert copies_within(facts) == []
    assert copies_between(facts[:30], facts[30:]) == []


def test_each_copy_is_told_once(tmp_path):
    paint(tmp_path / "a.png", 1)
    for name in ("b.png", "c.png"):
        (tmp_path / name).write_bytes((tmp_path / "a.png").read_bytes())
    facts = [read_facts(str(tmp_path / name)) for name in ("a.png", "b.png", "c.png")]
    found = copies_within(facts)
    assert [(copy.file[-5:], copy.of[-5:], copy.exact) for copy in found] == [
        ("b.png", "a.png", True),
        ("c.png", "a.png", True),
    ]


def flat(file, value, changed_pixels=0):
    """A picture without anything to tell it from others by its look."""
    pixels = np.full((SIDE, SIDE, 3), value, np.uint8)
    pixels[0, :changed_pixels] += 1
    Image.fromarray(pixels).save(file)
    return read_facts(str(file))


def test_an_exact_copy_is_found_among_many_that_look_alike(tmp_path):
    originals = [flat(tmp_path / f"dark{i}.png", 3, changed_pixels=i) for i in range(4)]
    copy = flat(tmp_path / "copy.png", 3, changed_pixels=2)
    other = flat(tmp_path / "other.png", 3, changed_pixels=9)
    exact, alike = copies_between(originals, [other, copy])
    assert (exact.file, exact.of, exact.exact) == (copy.file, originals[2].file, True)
    assert (alike.file, alike.of, alike.exact) == (other.file, originals[0].file, False)
    assert [(c.file, c.of) for c in copies_within([*originals, copy]) if c.exact] == [
        (copy.file, originals[2].file)
    ]


# --- memory ---------------------------------------------------------------------------------------


def test_memory_of_the_models_is_counted_exactly():
    cfg = tiny_config()
    torch.manual_seed(0)
    from detectron2.modeling import build_model

    bytes_of_one = sum(p.numel() * 4 for p in build_model(cfg).parameters())
    one = estimate_memory(cfg, [(64, 64)], num_gpus=1)
    assert one.models == 4 * bytes_of_one  # student, teacher, gradients, momentum
    assert estimate_memory(cfg, [(64, 64)], num_gpus=2).models == 5 * bytes_of_one
    stac = tiny_config({"SEMI.STRATEGY": "Stac"})
    assert estimate_memory(stac, [(64, 64)], num_gpus=1).models == 5 * bytes_of_one


def test_memory_grows_with_batch_views_and_size():
    settings = {"SOLVER.IMS_PER_BATCH": 2, "SOLVER.IMS_PER_BATCH_UNLABELED": 6}
    plain = estimate_memory(tiny_config(settings), [(64, 64)], num_gpus=1)
    assert plain.images == 8
    assert estimate_memory(tiny_config(settings), [(64, 64)], num_gpus=2).images == 4
    two_views = tiny_config(settings | {"INPUT.RECIPE": "UnbiasedTeacherRecipe"})
    assert estimate_memory(two_views, [(64, 64)], num_gpus=1).images == 10
    large = {"INPUT.MIN_SIZE_TRAIN": [128, 128], "INPUT.MAX_SIZE_TRAIN": 128}
    larger = estimate_memory(tiny_config(settings | large), [(64, 64)], num_gpus=1)
    assert 2 < larger.per_image / plain.per_image < 5  # four times the pixels, the same proposals
