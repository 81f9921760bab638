"""Images that are there more than once: by their files, by their contents, by their looks."""

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
