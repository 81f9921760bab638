"""Real paths of images behind symbolic links."""

import os

import pytest

from locreweight.data.checks import without_overlap
from locreweight.data.datasets.packed_records import ImageFiles
from locreweight.data.datasets.real_paths import RealPathCache
from locreweight.errors import UsageError


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Files, and all kinds of links to them and to their folders."""
    for folder in ("a/deep", "b"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("a/1.png", "a/deep/2.png", "b/1.png", "b/\udcff.png"):
        (tmp_path / file).write_bytes(b"")
    links = {
        "linked": "a",
        "b/up": "..",
        "b/same.png": "../a/1.png",
        "b/absolute.png": tmp_path / "a" / "1.png",
        "b/twice.png": "same.png",
        "b/thrice.png": "twice.png",
        "b/by_folder.png": "../linked/deep/2.png",
        "b/nowhere.png": "nothing.png",
        "b/loop.png": "loop.png",
        "b/ping": "pong",
        "b/pong": "ping",
        "b/folder.png": "../a/deep",
    }
    for link, target in links.items():
        (tmp_path / link).symlink_to(target)
    monkeypatch.chdir(tmp_path / "a")
    return tmp_path


WAYS = [
    "a/1.png",
    "a/./1.png",
    "a//1.png",
    "a/deep/../1.png",
    "linked/1.png",
    "linked/deep/2.png",
    "linked/..",
    "linked/../b/1.png",
    "b/up/a/1.png",
    "b/up/b/up/b/same.png",
    "b/same.png",
    "b/absolute.png",
    "b/twice.png",
    "b/thrice.png",
    "b/by_folder.png",
    "b/nowhere.png",
    "b/loop.png",
    "b/loop.png/x.png",
    "b/ping",
    "b/ping/x.png",
    "b/folder.png",
    "b/folder.png/",
    "b/\udcff.png",
    "b/missing.png",
    "missing/1.png",
    "missing/../a/1.png",
    "a/1.png/x.png",
    "",
    "..",
]


@pytest.mark.parametrize("way", WAYS)
def test_equals_os_path_realpath(tree, way):
    real_path = RealPathCache()
    for path in (os.path.join(tree, way), os.path.join("..", way), way):
        assert real_path(path) == os.path.realpath(path)
    assert real_path("/") == "/"
    assert real_path("/1.png") == "/1.png"


def test_folder_that_cannot_be_listed(tree, monkeypatch):
    """As of a folder that may be passed through but not read, which root may read nevertheless."""

    def closed(folder):
        raise PermissionError(folder)

    monkeypatch.setattr(os, "scandir", closed)
    for way in WAYS:
        path = os.path.join(tree, way)
        assert RealPathCache()(path) == os.path.realpath(path)


def image_files(*paths):
    return ImageFiles.of(map(os.fsencode, paths))


def test_images_are_found_through_links(tree):
    paths = [os.path.join(tree, way) for way in WAYS if way]
    for known in ("a/1.png", "a/deep/2.png", "b/\udcff.png"):
        target = os.path.realpath(tree / known)
        expected = [i for i, path in enumerate(paths) if os.path.realpath(path) == target]
        assert RealPathCache().find({target}, image_files(*paths)) == expected


@pytest.mark.parametrize("folders", [("",), ("a",), ("a", "linked")])
def test_repeats_are_found_through_links(tree, folders):
    """The folder ``a`` contains no links, so its images need not be resolved one by one."""
    ways = [way for way in WAYS if way.startswith(folders) and way.endswith(".png")]
    paths = [os.path.join(tree, way) for way in [*ways, *ways[:3]]]
    seen, expected = set(), []
    for i, path in enumerate(map(os.path.realpath, paths)):
        if path in seen:
            expected.append(i)
        seen.add(path)
    assert expected
    assert RealPathCache().find_repeats(image_files(*paths)) == expected


def test_images_of_the_same_name_are_no_repeats(tree):
    paths = [str(tree / name) for name in ("a/1.png", "b/1.png", "a/2.png", "a/deep/2.png")]
    assert RealPathCache().find_repeats(image_files(*paths)) == []
    assert RealPathCache().find_repeats(image_files(*paths[2:])) == []
    assert RealPathCache().find_repeats(image_files()) == []


def test_empty_inputs(tree):
    images = image_files(str(tree / "a/1.png"))
    assert RealPathCache().find(set(), images) == []
    assert RealPathCache().find({str(tree / "a/1.png")}, image_files()) == []
    assert RealPathCache().find({str(tree / "a/1.png")}, images) == [0]


def test_each_folder_is_listed_once(tree, monkeypatch):
    scandir, listed = os.scandir, []
    monkeypatch.setattr(os, "scandir", lambda folder: listed.append(folder) or scandir(folder))
    monkeypatch.setattr(os, "lstat", lambda path: pytest.fail(f"{path} was asked about"))
    real_path = RealPathCache()
    real_path._real_folder = str  # asks about each part of each folder's path, once
    for i in range(1000):
        assert real_path(f"{tree}/a/{i}.png") == f"{tree}/a/{i}.png"
    assert listed == [f"{tree}/a"]


def test_common_images(tree):
    labeled = [{"file_name": str(tree / "a/1.png")}]
    images = image_files(*(str(tree / name) for name in ("b/1.png", "b/same.png", "b/x.png")))
    with pytest.raises(
        UsageError, match=r"1 unlabeled images are also labeled.*b/same\.png.*EXCLUDE"
    ):
        without_overlap(labeled, images, RealPathCache(), exclude=False)
    kept = without_overlap(labeled, images, RealPathCache(), exclude=True)
    assert [os.path.basename(r["file_name"]) for r in kept] == ["1.png", "x.png"]
    assert without_overlap([], images, RealPathCache(), exclude=False) is images
