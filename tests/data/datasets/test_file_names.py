"""Names of images that nearly match those on the disk."""

import logging
import os
import unicodedata

import pytest

from locreweight.data.datasets.file_names import ImageFinder, describe_missing, read_text
from locreweight.errors import UsageError


@pytest.fixture
def find(tmp_path):
    """Makes files in the folder ``data/images`` and finds names; returns relative paths."""
    folder = tmp_path / "data" / "images"

    def search(files, *names, allow_outside=False):
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).touch()
        finder = ImageFinder("a.json", str(folder), allow_outside=allow_outside)
        return [os.path.relpath(path, folder) for path in finder.find_all(names)]

    return search


COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "café.jpg") for form in ("NFC", "NFD"))
FOUND = {
    # name of the case: (file on the disk, name in the annotations)
    "letter case": ("IMG_1.JPG", "img_1.jpg"),
    "letter case of a folder": ("Sub/a.jpg", "sub/A.jpg"),
    "decomposed": (DECOMPOSED, COMPOSED),
    "composed": (COMPOSED, DECOMPOSED),
    "backslash": ("sub/a.jpg", "sub\\a.jpg"),
    "leading dot": ("sub/a.jpg", ".\\sub\\a.jpg"),
    "percent-encoding": ("my cat.jpg", "my%20cat.jpg"),
    "percent-encoded letters": ("café.jpg", "caf%C3%A9.jpg"),
    "blanks": ("a.jpg", " a.jpg "),
    "the image folder": ("a.jpg", "images/a.jpg"),
    "folders of the image folder": ("sub/a.jpg", "data/images/sub/a.jpg"),
    "Windows path": ("a.jpg", "D:\\work\\train\\a.jpg"),
    "Windows share": ("a.jpg", "\\\\server\\train\\a.jpg"),
    "absolute path elsewhere": ("sub/a.jpg", "/home/someone/sub/a.jpg"),
    "path upwards": ("a.jpg", "../../somewhere/a.jpg"),
    "file URL": ("my cat.jpg", "file:///home/someone/my%20cat.jpg"),
    "URL": ("a.jpg", "https://example.com/images/a.jpg?size=large#top"),
    "URL of a name with #": ("a#1.jpg", "https://example.com/a#1.jpg"),
    "bucket": ("sub/a.jpg", "s3://bucket/sub/a.jpg"),
    "Label Studio upload": ("abcdef01-x.jpg", "images/upload/1/abcdef01-x.jpg"),
    "Label Studio upload, upwards": ("abcdef01-x.jpg", "../../media/upload/1/abcdef01-x.jpg"),
    "Label Studio export": ("abcdef01-x.jpg", "images/abcdef01-x.jpg"),
    "Label Studio, original name": ("x.jpg", "images/abcdef01-x.jpg"),
    "Label Studio, local file": ("sub/x y.jpg", "/data/local-files/?d=sub/x%20y.jpg"),
    "in a subfolder": ("sub/a.jpg", "/somewhere/a.jpg"),
}


@pytest.mark.parametrize("case", FOUND)
def test_the_only_file_that_matches_is_found(find, case, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("locreweight"), "propagate", True)
    file, name = FOUND[case]
    with caplog.at_level(logging.INFO):
        assert find([file, "other.jpg"], name, "other.jpg") == [file, "other.jpg"]
    assert "a.json: 1 of 2 file names differ" in caplog.text


def test_names_that_exist_are_used_as_they_are(find):
    files = ["a%20b.jpg", "a b.jpg", "c\\d.jpg", "c/d.jpg", "E.jpg", "e.jpg", COMPOSED, DECOMPOSED]
    assert find(files, *files) == files


def test_the_folder_is_not_listed_without_need(find, monkeypatch):
    find(["a.jpg", "b.jpg"])
    monkeypatch.delattr(os, "walk")
    assert find([], "a.jpg", "b.jpg") == ["a.jpg", "b.jpg"]


def test_a_name_of_several_files_is_not_decided(find, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("locreweight"), "propagate", True)
    assert find(["x/a.jpg", "y/a.jpg"], "/elsewhere/z/a.jpg".lstrip("/"), "http://e.org/a.jpg") == [
        "elsewhere/z/a.jpg",
        "http:/e.org/a.jpg",
    ]
    assert "1 of 2 file names are not on the disk, and several files" in caplog.text
    assert "x/a.jpg or y/a.jpg" in caplog.text


def test_the_longest_part_of_a_path_decides(find):
    assert find(["x/a.jpg", "y/a.jpg"], "http://example.com/y/a.jpg") == ["y/a.jpg"]


def test_a_relative_path_is_not_shortened(find):
    """The image of the same name in another folder is another image."""
    assert find(["0001.jpg"], "val/0001.jpg") == ["val/0001.jpg"]


def test_two_names_are_not_the_same_image(find):
    with pytest.raises(UsageError, match=r"http://e\.org/x/1\.jpg and http://e\.org/y/1\.jpg.*one"):
        find(["1.jpg"], "http://e.org/x/1.jpg", "http://e.org/y/1.jpg")


def test_a_path_to_an_existing_file_elsewhere_is_an_error(find, tmp_path):
    elsewhere = tmp_path / "elsewhere" / "a.jpg"
    elsewhere.parent.mkdir()
    elsewhere.touch()
    for name in (str(elsewhere), "../../elsewhere/a.jpg"):
        with pytest.raises(UsageError, match="may lie outside"):
            find(["a.jpg"], name)
        assert find(["a.jpg"], name, allow_outside=True) == ["../../elsewhere/a.jpg"]


def test_companion_files_do_not_match(find):
    assert find(["__MACOSX/a.jpg", ".x/a.jpg"], "http://e.org/a.jpg") == ["http:/e.org/a.jpg"]


def test_linked_folders_are_searched(find, tmp_path):
    other = tmp_path / "elsewhere" / "v"
    other.mkdir(parents=True)
    (other / "IMG_1.JPG").touch()
    (other / "back").symlink_to(tmp_path / "data")  # a cycle
    find(["a.jpg"])
    (tmp_path / "data/images/linked").symlink_to(other)
    assert find([], "linked/img_1.jpg") == ["linked/IMG_1.JPG"]


def test_links_do_not_hide_the_folders_they_lead_to(find, tmp_path):
    find(["v/a.jpg"])
    (tmp_path / "data/images/first").symlink_to("v")
    assert find([], "v/A.JPG") == ["v/a.jpg"]


def test_links_to_parent_folders_are_not_searched(find, tmp_path):
    find(["a.jpg"])
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "b.jpg").touch()
    (tmp_path / "data/images/up").symlink_to(tmp_path)
    assert find([], "B.JPG") == ["B.JPG"]


def test_the_nearest_name(tmp_path):
    for name in ("frame_0001.jpg", "frame_0002.jpg", "zebra.jpg", "._frame_0003.jpg"):
        (tmp_path / name).touch()
    file = str(tmp_path / "Frame-0002.jpg")
    assert describe_missing(file) == f"{file} (nearest: frame_0002.jpg)"
    assert describe_missing(str(tmp_path / "q.tif")) == str(tmp_path / "q.tif")
    assert describe_missing(str(tmp_path / "no/a.jpg")).endswith(
        f"(there is no folder {tmp_path}/no)"
    )


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_in_unicode_encodings(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("café".encode(encoding))
    assert read_text(tmp_path / "a.txt") == "café"
