"""Unusual and broken image files, labeled and unlabeled: correct pixels or a clear error."""

import os

import numpy as np
import pytest
from PIL import Image

from locreweight.data import checks
from locreweight.data.image_io import UnreadableImage, read_rgb
from locreweight.data.loader import Stream, StreamPosition
from locreweight.errors import UsageError
from tests.odd_images import BROKEN, VALID
from tests.tiny_data import edit_json
from tests.tiny_project import Project

POLICIES = ("SoftTeacherPolicy", "UnbiasedTeacherPolicy")


@pytest.fixture
def project(tmp_path):
    """One labeled and one test image. Images keep their size, and labeled ones their colors."""
    project = Project(tmp_path)
    project.set("INPUT.MIN_SIZE_TRAIN", "(0,)")
    project.set("INPUT.RANDOM_FLIP", "none")
    project.set(
        "INPUT.AUGMENTATION_POLICY", "UnbiasedTeacherPolicy"
    )  # its first labeled view is weak
    for file in (project.json, project.test_json):
        edit_json(file, keep_one_image)
    return project


def keep_one_image(content):
    content["images"] = content["images"][:1]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] == 1]


def set_image(json_file, name, height, width):
    """Set the name and size of the only image in a JSON file, with a box that covers it."""

    def edit(content):
        content["images"][0].update(file_name=name, height=height, width=width)
        content["annotations"] = content["annotations"][:1]
        content["annotations"][0]["bbox"] = [0, 0, width, height]

    edit_json(json_file, edit)


def assert_pixels(image, expected, tolerance):
    """Check the image of a view, which is BGR, up to a mean difference."""
    pixels = image.numpy()[::-1].transpose(1, 2, 0)
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(int) - expected).mean() <= tolerance


@pytest.mark.parametrize("case", VALID)
def test_labeled_image_is_read_correctly(project, case):
    name, make, tolerance = VALID[case]
    expected = make(project.images / name)
    set_image(project.json, name, *expected.shape[:2])
    sets, dataset = project.read()
    assert [os.path.basename(r["file_name"]) for r in sets.labeled] == [name]
    view = dataset[StreamPosition(Stream.LABELED, 0)][0]
    assert_pixels(view["image"], expected, tolerance)
    height, width = expected.shape[:2]
    assert view["instances"].gt_boxes.tensor.tolist() == [[0, 0, width, height]]


@pytest.mark.parametrize("case", VALID)
def test_unlabeled_image_is_read_correctly(project, case):
    name, make, tolerance = VALID[case]
    folder = project.folder / "alone"
    folder.mkdir()
    expected = make(folder / name)
    project.set("DATASETS.UNLABELED", [f"folder:{folder}"])
    _, dataset = project.read()
    sample = dataset[StreamPosition(Stream.UNLABELED, 0)]
    assert (os.path.basename(sample.file_name), sample.read_errors) == (name, ())
    assert_pixels(sample.weak.image, expected, tolerance)
    assert sample.weak.matrix.tolist() == np.eye(3).tolist()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("sizes", [("(800,)", 1333), ("(48,)", 64)])
@pytest.mark.parametrize("case", ["1x1", "20000x10", "10x20000"])
def test_policies_accept_extreme_shapes(project, case, sizes, policy):
    name, make, _ = VALID[case]
    expected = make(project.images / name)
    set_image(project.json, name, *expected.shape[:2])
    folder = project.folder / "alone"
    folder.mkdir()
    make(folder / name)
    project.set("DATASETS.UNLABELED", [f"folder:{folder}"])
    project.set("INPUT.AUGMENTATION_POLICY", policy)
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
    # Even if the short side has a pixel or two only, the box must not vanish.
    assert all(len(x["instances"]) == 1 for x in labeled)


@pytest.mark.parametrize("role", ["labeled", "test"])
@pytest.mark.parametrize("case", BROKEN)
def test_broken_annotated_image_is_an_error_before_training(project, case, role):
    name, content = BROKEN[case]
    json_file, folder = {
        "labeled": (project.json, project.images),
        "test": (project.test_json, project.test_images),
    }[role]
    (folder / name).write_bytes(content)
    set_image(json_file, name, 40, 60)
    with pytest.raises(UsageError, match="1 of 2 annotated images cannot be used") as caught:
        project.read()
    assert str(folder / name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", BROKEN)
def test_broken_unlabeled_image_is_skipped_and_named(project, case, monkeypatch):
    monkeypatch.chdir(project.folder)  # PostScript would write here
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
def test_images_up_to_twice_pillows_limit_are_read(project, monkeypatch, limit, read):
    """The image has 2400 pixels. Between the limit and twice the limit, Pillow only warns."""
    folder = project.folder / "alone"
    folder.mkdir()
    VALID["gray"][1](folder / "a.png")
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
def test_decoding_check_can_be_disabled(project, role):
    json_file = project.json if role == "labeled" else project.test_json
    folder = project.images if role == "labeled" else project.test_images
    (folder / "a.png").write_bytes(b"")
    set_image(json_file, "a.png", 40, 60)
    project.set("DATASETS.CHECKS.DECODE_IMAGES", False)
    project.read()


def test_many_broken_images_are_counted(tmp_path):
    project = Project(tmp_path)
    for file in project.images.iterdir():
        file.write_bytes(b"")
    with pytest.raises(UsageError, match="4 of 6 annotated images cannot be used.*0003.png"):
        project.read()


def test_one_process_per_machine_checks_images_for_all(project, monkeypatch):
    monkeypatch.setattr(checks.comm, "get_local_rank", lambda: 1)
    monkeypatch.setattr(checks.comm, "all_gather", lambda own: [["a.png (broken)"], own])
    monkeypatch.setattr(checks, "read_rgb", lambda _: pytest.fail("it was read"))
    with pytest.raises(UsageError, match=r"1 of 2 annotated .*: a\.png \(broken\)"):
        project.read()


class TestSizes:
    """Width and height in a JSON file must be those of the image after its EXIF rotation."""

    @pytest.mark.parametrize("role", ["labeled", "test"])
    @pytest.mark.parametrize("size", [(60, 40), (41, 60), (1, 1)])
    def test_wrong_size_is_an_error_before_training(self, project, role, size):
        json_file = project.json if role == "labeled" else project.test_json
        folder = project.images if role == "labeled" else project.test_images
        VALID["gray"][1](folder / "a.png")
        set_image(json_file, "a.png", *size)
        words = rf"a\.png is 60 x 40 pixels .* its annotation says {size[1]} x {size[0]}"
        with pytest.raises(UsageError, match=words):
            project.read()

    @pytest.mark.parametrize("orientation", [5, 6, 7, 8])
    def test_size_before_rotation_is_an_error(self, project, orientation):
        VALID[f"EXIF orientation {orientation}"][1](project.images / "a.png")
        set_image(project.json, "a.png", 40, 60)
        with pytest.raises(UsageError, match=r"40 x 60 pixels after EXIF rotation"):
            project.read()

    def test_wrong_size_of_an_unlabeled_image_is_ignored(self, project):
        VALID["gray"][1](project.test_images / "a.png")
        other = project.folder / "other.json"
        other.write_text(project.test_json.read_text())
        set_image(other, "a.png", 1, 1)
        project.set("DATASETS.UNLABELED", [f"coco:{other}:{project.test_images}"])
        _, dataset = project.read()
        assert dataset[StreamPosition(Stream.UNLABELED, 0)].weak.image_size == (40, 60)


class TestNotRegularFile:
    """Names of broken links, pipes and folders instead of files."""

    @pytest.mark.parametrize("name", ["link to itself", "broken link", "pipe", "folder"])
    def test_labeled_image_is_missing(self, project, name):
        MAKE_NOT_REGULAR[name](project.images / f"{name}.png")
        set_image(project.json, f"{name}.png", 40, 60)
        with pytest.raises(UsageError, match=rf"1 of 1 images are missing.*{name}\.png"):
            project.read()

    @pytest.mark.parametrize("name", ["link to itself", "broken link"])
    def test_broken_link_among_unlabeled_images_is_skipped(self, project, name):
        MAKE_NOT_REGULAR[name](project.unlabeled / f"{name}.png")
        sets, dataset = project.read()
        samples = [dataset[StreamPosition(Stream.UNLABELED, i)] for i in range(len(sets.unlabeled))]
        assert any(f"{name}.png" in message for s in samples for message in s.read_errors)

    @pytest.mark.parametrize("name", ["pipe", "folder"])
    def test_pipes_and_folders_among_unlabeled_images_are_ignored(self, project, name):
        MAKE_NOT_REGULAR[name](project.unlabeled / f"{name}.png")
        sets, _ = project.read()
        assert len(sets.unlabeled) == 3


MAKE_NOT_REGULAR = {
    "link to itself": lambda path: path.symlink_to(path.name),
    "broken link": lambda path: path.symlink_to("nowhere.jpg"),
    "pipe": os.mkfifo,
    "folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize(
    "make",
    [os.mkfifo, os.mkdir, lambda file: file.symlink_to("/dev/zero")],
    ids=["pipe", "folder", "device"],
)
def test_read_rgb_refuses_pipes_folders_and_devices(tmp_path, make):
    """Unlabeled JSON files may name them. Labeled images are checked to be files earlier."""
    make(tmp_path / "image.jpg")
    with pytest.raises(UnreadableImage, match=r"image\.jpg: .*a folder, a pipe or a device"):
        read_rgb(str(tmp_path / "image.jpg"))
