"""Images that occur more than once: the same file, content or appearance."""

import numpy as np
import pytest
from PIL import Image

from locreweight.data.inspection.findings import Severity
from locreweight.data.inspection.images import copies_between, copies_within, read_facts, survey
from tests.checked_data import SIDE, Project, paint
from tests.tiny_data import edit_json


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def copy_of(source, target, how):
    with Image.open(source) as image:
        if how == "content":
            target.with_suffix(".png").write_bytes(source.read_bytes())
        elif how == "compressed":
            image.convert("RGB").save(target.with_suffix(".jpg"), quality=50)
        else:
            image.resize((SIDE // 2, SIDE // 2)).save(target.with_suffix(".png"))


@pytest.mark.parametrize("how", ["content", "compressed", "halved"])
def test_test_images_among_unlabeled_images(project, how):
    copy_of(project.test_images / "0001.png", project.unlabeled / "hidden", how)
    (finding,) = project.findings()
    assert finding.severity is (Severity.ERROR if how == "content" else Severity.WARNING)
    assert "1 unlabeled images are also test images" in finding.text
    (pair,) = finding.files
    assert "unlabeled/hidden." in pair and pair.endswith(f"= {project.test_images / '0001.png'}")


def test_copies_of_labeled_images_and_within_a_set(project):
    copy_of(project.images / "0000.png", project.unlabeled / "again", "content")
    copy_of(project.unlabeled / "0003.png", project.unlabeled / "twice", "content")
    texts = project.texts(Severity.WARNING)
    assert len(texts) == 2
    assert "1 unlabeled images are also labeled images (the same file content)" in texts[0]
    assert "1 unlabeled images occur more than once (the same file content)" in texts[1]


def test_unlabeled_files_of_the_labeled_set_have_a_fix(project):
    project.settings["DATASETS.UNLABELED"].append(f"folder:{project.images}")
    (error,) = project.findings()
    assert "5 unlabeled images are the same files as labeled images" in error.text
    assert error.fixes == {"DATASETS.EXCLUDE_LABELED": "True"}
    project.settings["DATASETS.EXCLUDE_LABELED"] = True
    assert project.findings() == []


def test_labeled_files_of_the_test_set(project):
    project.settings["DATASETS.TEST"] = project.settings["DATASETS.TRAIN"]
    (error,) = project.findings()
    assert error.severity is Severity.ERROR
    assert "5 labeled images are the same files as test images" in error.text
    assert len(error.files) == 5 and error.files[0] == str(project.images / "0000.png")


def list_again(content):
    content["images"].append(content["images"][0] | {"id": 99})


def test_file_with_two_entries(project):
    edit_json(project.json, list_again)
    (warning,) = project.findings()
    assert warning.severity is Severity.WARNING
    assert "1 entries of the labeled images refer to a file that another entry has" in warning.text
    assert warning.files == [str(project.images / "0000.png")]


def test_file_of_two_data_sets_and_link(project):
    second = project.json.with_name("second.json")
    second.write_text(project.json.read_text())
    project.settings["DATASETS.TRAIN"].append(f"coco:{second}:{project.images}")
    (project.unlabeled / "link.png").symlink_to(project.unlabeled / "0001.png")
    texts = project.texts(Severity.WARNING)
    assert [text.partition(" refer to a file")[0] for text in texts] == [
        "5 entries of the labeled images",
        "1 entries of the unlabeled images",
    ]


def test_different_images_are_no_copies(tmp_path):
    for seed in range(60):
        paint(tmp_path / f"{seed:02d}.png", seed)
    facts = list(survey(sorted(map(str, tmp_path.iterdir()))).values())
    assert copies_within(facts) == []
    assert copies_between(facts[:30], facts[30:]) == []


def test_each_copy_is_reported_once(tmp_path):
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
    """A nearly uniform image, whose perceptual hash is that of other such images."""
    pixels = np.full((SIDE, SIDE, 3), value, np.uint8)
    pixels[0, :changed_pixels] += 1
    Image.fromarray(pixels).save(file)
    return read_facts(str(file))


def test_exact_copy_among_similar_images(tmp_path):
    originals = [flat(tmp_path / f"dark{i}.png", 3, changed_pixels=i) for i in range(4)]
    copy = flat(tmp_path / "copy.png", 3, changed_pixels=2)
    other = flat(tmp_path / "other.png", 3, changed_pixels=9)
    exact, similar = copies_between(originals, [other, copy])
    assert (exact.file, exact.of, exact.exact) == (copy.file, originals[2].file, True)
    assert (similar.file, similar.of, similar.exact) == (other.file, originals[0].file, False)
    assert [(c.file, c.of) for c in copies_within([*originals, copy]) if c.exact] == [
        (copy.file, originals[2].file)
    ]
