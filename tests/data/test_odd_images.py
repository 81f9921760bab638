"""Every kind of image file: read rightly, or one clear error, labeled and unlabeled alike."""

import os

import numpy as np
import pytest
from PIL import Image

from locreweight.data import checks as image_checks
from locreweight.data.image_io import UnreadableImage, read_rgb
from locreweight.data.loader import Stream, StreamPosition
from locreweight.errors import UsageError
from tests.odd_images import BROKEN, SOUND
from tests.tiny_data import edit_json
from tests.tiny_project import Project

RECIPES = ("SoftTeacherPolicy", "UnbiasedTeacherPolicy")


@pytest.fixture
def project(tmp_path):
    """One labeled image and one test image; images keep their size, labeled ones their colors."""
    project = Project(tmp_path)
    project.set("INPUT.MIN_SIZE_TRAIN", "(0,)")
    project.set("INPUT.RANDOM_FLIP", "none")
    project.set(
        "INPUT.AUGMENTATION_POLICY", "UnbiasedTeacherPolicy"
    )  # its first labeled view is the weak one
    for file in (project.json, project.test_json):
        edit_json(file, keep_one_image)
    return project


def keep_one_image(content):
    content["images"] = content["images"][:1]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] == 1]


def name_labeled(json_file, name, height, width):
    """Names the one image in a json, with a box that covers it."""

    def edit(content):
        content["images"][0].update(file_name=name, height=height, width=width)
        content["annotations"] = content["annotations"][:1]
        content["annotations"][0]["bbox"] = [0, 0, width, height]

    edit_json(json_file, edit)


def assert_shows(image, expected, tolerance):
    """A view's image, whose channels are BGR, shows these pixels."""
    found = image.numpy()[::-1].transpose(1, 2, 0)
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).mean() <= tolerance


@pytest.mark.parametrize("case", SOUND)
def test_a_sound_image_with_labels(project, case):
    name, make, tolerance = SOUND[case]
    expected = make(project.images / name)
    name_labeled(project.json, name, *expected.shape[:2])
    sets, dataset = project.read()
    assert [os.path.basename(r["file_name"]) for r in sets.labeled] == [name]
    view = dataset[StreamPosition(Stream.LABELED, 0)][0]
    assert_shows(view["image"], expected, tolerance)
    height, width = expected.shape[:2]
    assert view["instances"].gt_boxes.tensor.tolist() == [[0, 0, width, height]]


@pytest.mark.parametrize("case", SOUND)
def test_a_sound_image_without_labels(project, case):
    name, make, tolerance = SOUND[case]
    folder = project.folder / "alone"
    folder.mkdir()
    expected = make(folder / name)
    project.set("DATASETS.UNLABELED", [f"folder:{folder}"])
    _, dataset = project.read()
    sample = dataset[StreamPosition(Stream.UNLABELED, 0)]
    assert (os.path.basename(sample.file_name), sample.read_errors) == (name, ())
    assert_shows(sample.weak.image, expected, tolerance)
    assert sample.weak.matrix.tolist() == np.eye(3).tolist()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("sizes", [("(800,)", 1333), ("(48,)", 64)])
@pytest.mark.parametrize("case", ["1x1", "20000x10", "10x20000"])
def test_no_shape_is_too_odd_for_a_recipe(project, case, sizes, recipe):
    name, make, _ = SOUND[case]
    expected = make(project.images / name)
    name_labeled(project.json, name, *expected.shape[:2])
    folder = project.folder / "alone"
    folder.mkdir()
    make(folder / name)
    project.set("DATASETS.UNLABELED", [f"folder:{folder}"])
    project.set("INPUT.AUGMENTATION_POLICY", recipe)
    project.set("INPUT.MIN_SIZE_TRAIN", sizes[0])
    project.set("INPUT.MAX_SIZE_TRAIN", sizes[1])
    _, dataset = project.read()
    labeled = dataset[StreamPosition(Stream.LABELED, 0)]
    sample = dataset[StreamPosition(Stream.UNLABELED, 0)]
    for image in (*(x["image"] for x in labeled), sample.weak.image, sample.strong.image):
        assert 1 <= min(image.shape[1:]) <= max(image.shape[1:]) <= sizes[1]
    for view in (sample.weak, sample.strong):
        assert np.isfinite(view.matrix.numpy()).all()
        assert abs(np.linalg.det(view.matrix.numpy())) > 0
    # Of a short side that is a pixel or two the box may keep none of its own.
    assert all(len(x["instances"]) == 1 for x in labeled)


@pytest.mark.parametrize("role", ["labeled", "test"])
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_annotated_image_is_an_error_before_training(project, case, role):
    name, content = BROKEN[case]
    json_file, folder = {
        "labeled": (project.json, project.images),
        "test": (project.test_json, project.test_images),
    }[role]
    (folder / name).write_bytes(content)
    name_labeled(json_file, name, 40, 60)
    with pytest.raises(UsageError, match="1 of 2 annotated images cannot be used") as caught:
        project.read()
    assert str(folder / name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_unlabeled_image_is_skipped_with_its_name(project, case, monkeypatch):
    monkeypatch.chdir(project.folder)  # where PostScript would write
    name, content = BROKEN[case]
    (project.unlabeled / name).write_bytes(content)
    sets, dataset = project.read()
    samples = [dataset[StreamPosition(Stream.UNLABELED, i)] for i in range(len(sets.unlabeled))]
    assert name not in {os.path.basename(sample.file_name) for sample in samples}
    skipped = {message for sample in samples for message in sample.read_errors}
    assert len(skipped) == 1
    assert str(project.unlabeled / name) in skipped.pop()
    assert not (project.folder / "OUT").exists()


@pytest.mark.parametrize(("limit", "read"), [(1300, True), (1200, True), (1199, False)])
def test_images_of_twice_pillows_limit_are_read_and_larger_ones_refused(
    project, monkeypatch, limit, read
):
    """The image has 2400 pixels. From the limit to twice as many Pillow alone warns."""
    folder = project.folder / "alone"
    folder.mkdir()
    SOUND["gray"][1](folder / "a.png")
    project.set("DATASETS.UNLABELED", [f"folder:{folder}"])
    project.set("DATASETS.CHECKS.DECODE_IMAGES", False)  # the others are larger
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", limit)
    _, dataset = project.read()
    expected = (
        pytest.warns(Image.DecompressionBombWarning)
        if read
        else pytest.raises(UnreadableImage, match=r"a\.png: DecompressionBombError")
    )
    with expected:
        dataset[StreamPosition(Stream.UNLABELED, 0)]


@pytest.mark.parametrize("role", ["labeled", "test"])
def test_the_check_can_be_left_out(project, role):
    json_file = project.json if role == "labeled" else project.test_json
    folder = project.images if role == "labeled" else project.test_images
    (folder / "a.png").write_bytes(b"")
    name_labeled(json_file, "a.png", 40, 60)
    project.set("DATASETS.CHECKS.DECODE_IMAGES", False)
    project.read()


def test_many_broken_images_are_counted_and_some_named(tmp_path):
    project = Project(tmp_path)
    for file in project.images.iterdir():
        file.write_bytes(b"")
    with pytest.raises(UsageError, match="4 of 6 annotated images cannot be used.*0003.png"):
        project.read()


def test_one_process_of_a_machine_reads_and_all_learn_of_a_fault(project, monkeypatch):
    monkeypatch.setattr(image_checks.comm, "get_local_rank", lambda: 1)
    monkeypatch.setattr(image_checks.comm, "all_gather", lambda mine: [["a.png (broken)"], mine])
    monkeypatch.setattr(image_checks, "read_rgb", lambda _: pytest.fail("it was read"))
    with pytest.raises(UsageError, match=r"1 of 2 annotated .*: a\.png \(broken\)"):
        project.read()


class TestSizes:
    """A json's width and height are those of the image as it is displayed."""

    @pytest.mark.parametrize("role", ["labeled", "test"])
    @pytest.mark.parametrize("size", [(60, 40), (41, 60), (1, 1)])
    def test_another_size_is_an_error_before_training(self, project, role, size):
        json_file = project.json if role == "labeled" else project.test_json
        folder = project.images if role == "labeled" else project.test_images
        SOUND["gray"][1](folder / "a.png")
        name_labeled(json_file, "a.png", *size)
        words = rf"a\.png is 60 x 40 pixels .* its annotation says {size[1]} x {size[0]}"
        with pytest.raises(UsageError, match=words):
            project.read()

    @pytest.mark.parametrize("orientation", [5, 6, 7, 8])
    def test_so_is_that_of_an_image_before_its_rotation(self, project, orientation):
        SOUND[f"EXIF orientation {orientation}"][1](project.images / "a.png")
        name_labeled(project.json, "a.png", 40, 60)
        with pytest.raises(UsageError, match=r"40 x 60 pixels \(as its EXIF rotates it\)"):
            project.read()

    def test_an_unlabeled_json_may_be_wrong(self, project):
        SOUND["gray"][1](project.test_images / "a.png")
        other = project.folder / "other.json"
        other.write_text(project.test_json.read_text())
        name_labeled(other, "a.png", 1, 1)
        project.set("DATASETS.UNLABELED", [f"coco:{other}:{project.test_images}"])
        _, dataset = project.read()
        assert dataset[StreamPosition(Stream.UNLABELED, 0)].weak.image_size == (40, 60)


class TestNoFile:
    """What a name may stand for beside an image."""

    @pytest.mark.parametrize("name", ["loop", "nowhere", "pipe", "folder"])
    def test_as_a_labeled_one_it_is_missing(self, project, name):
        NO_FILES[name](project.images / f"{name}.png")
        name_labeled(project.json, f"{name}.png", 40, 60)
        with pytest.raises(UsageError, match=rf"1 of 1 images are missing.*{name}\.png"):
            project.read()

    @pytest.mark.parametrize("name", ["loop", "nowhere"])
    def test_an_unlabeled_link_that_leads_nowhere_is_skipped(self, project, name):
        NO_FILES[name](project.unlabeled / f"{name}.png")
        sets, dataset = project.read()
        samples = [dataset[StreamPosition(Stream.UNLABELED, i)] for i in range(len(sets.unlabeled))]
        assert any(f"{name}.png" in message for s in samples for message in s.read_errors)

    @pytest.mark.parametrize("name", ["pipe", "folder"])
    def test_pipes_and_folders_are_no_unlabeled_images(self, project, name):
        NO_FILES[name](project.unlabeled / f"{name}.png")
        sets, _ = project.read()
        assert len(sets.unlabeled) == 3


NO_FILES = {
    "loop": lambda path: path.symlink_to(path.name),
    "nowhere": lambda path: path.symlink_to("nowhere.jpg"),
    "pipe": os.mkfifo,
    "folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda file: file.symlink_to("/dev/zero")])
def test_a_pipe_that_annotations_name_is_an_unreadable_image(tmp_path, make):
    """An unlabeled one: of labeled ones it is checked before that they are files."""
    make(tmp_path / "image.jpg")
    with pytest.raises(UnreadableImage, match=r"image\.jpg: .*a folder, a pipe or a device"):
        read_rgb(str(tmp_path / "image.jpg"))
