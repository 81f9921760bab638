"""Images without annotations: folders and lists."""

import os
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog

from locreweight.data.datasets import image_folders
from locreweight.data.datasets.catalog import register
from locreweight.data.datasets.image_folders import IMAGE_SUFFIXES, load_folder, load_list
from locreweight.errors import UsageError
from tests.tiny_data import make_folder
from tests.tiny_project import Project


def files(records):
    return [record["file_name"] for record in records]


@pytest.fixture
def images(tmp_path):
    """0000.png to 0003.png."""
    return make_folder(tmp_path / "images")


@pytest.fixture
def listed(tmp_path, images):
    """Reads a list with this content."""

    def read(content, **options):
        (tmp_path / "index.txt").write_bytes(content)
        return load_list(str(tmp_path / "index.txt"), str(images), **options)

    return read


class TestList:
    def test_images_in_listed_order(self, listed, images):
        records = listed(b"0002.png\n0000.png\n0003.png\n")
        assert files(records) == [str(images / f"{i:04d}.png") for i in (2, 0, 3)]
        assert [record["image_id"] for record in records] == [0, 1, 2]

    @pytest.mark.parametrize(
        ("content", "names"),
        [
            (b"0002.png", ["0002.png"]),
            (b"\n\n0002.png\n  \n\t\n0001.png\n\n", ["0002.png", "0001.png"]),
            (b"0002.png\r\n\r\n0001.png\r\n", ["0002.png", "0001.png"]),
            (b"\xef\xbb\xbf0002.png\n0001.png\n", ["0002.png", "0001.png"]),
            (b" 0002.png \n0001.png\n", [" 0002.png ", "0001.png"]),
            (b"0001.png\n\xff\xe4.png\n", ["0001.png", "\udcff\udce4.png"]),
            ("0001.png\nä/ö.png\n".encode(), ["0001.png", "ä/ö.png"]),
            (b"./0001.png\na//b.png\n", ["./0001.png", "a//b.png"]),
            (b"0001.png\nno image by its name\n", ["0001.png", "no image by its name"]),
            (b"0001.png\na..b.png\n..c/d.png\n", ["0001.png", "a..b.png", "..c/d.png"]),
        ],
    )
    def test_each_line_is_a_name(self, listed, images, content, names):
        assert files(listed(content)) == [os.path.join(images, name) for name in names]

    @pytest.mark.parametrize("name", [b"/etc/passwd", b"../a.png", b"a/../../b.png", b".."])
    def test_names_outside_need_permission(self, listed, images, name):
        content = b"0000.png\n" + name + b"\n"
        with pytest.raises(UsageError, match=r"index\.txt contains .*ALLOW_OUTSIDE_PATHS True"):
            listed(content)
        allowed = listed(content, allow_outside=True)
        assert files(allowed)[1] == os.path.join(images, os.fsdecode(name))

    @pytest.mark.parametrize("content", [b"", b"\n", b"\r\n \n", b"\xef\xbb\xbf"])
    def test_empty_list(self, listed, content):
        with pytest.raises(UsageError, match=r"index\.txt lists no image"):
            listed(content)

    @pytest.mark.parametrize("content", [b"0001.png\n0000.png\n0001.png", b"x\n0000.png\r\nx\r\n"])
    def test_repeated_image(self, listed, content):
        with pytest.raises(UsageError, match=r"lists (0001\.png|x) more than once.*sort -u"):
            listed(content)

    def test_names_with_equal_hashes(self, listed, monkeypatch):
        monkeypatch.setattr(image_folders, "hash", lambda name: len(name), raising=False)
        assert len(listed(b"0001.png\n0000.png\n0002.png\n")) == 3
        with pytest.raises(UsageError, match=r"lists 0000\.png more than once"):
            listed(b"0001.png\n0000.png\n0002.png\n0000.png\n")

    def test_utf16_list(self, listed):
        """In UTF-16."""
        assert names(listed("0000.png\r\n0001.png\r\n".encode("utf-16"))) == [
            "0000.png",
            "0001.png",
        ]

    def test_windows_line_ends(self, listed):
        """No name exists, but each is that of one image."""
        assert names(listed(b"C:\\data\\0000.PNG\r\n.\\0001.png\r\n")) == ["0000.png", "0001.png"]

    def test_macos_metadata_is_left_out(self, listed):
        found = listed(b"0000.png\n._0000.png\n__MACOSX/0001.png\nx/__MACOSX/0001.png\n0001.png\n")
        assert names(found) == ["0000.png", "0001.png"]

    def test_wrong_folder(self, listed):
        with pytest.raises(
            UsageError, match=r"none of 2 sampled images .*images/a/1\.png.*relative"
        ):
            listed(b"a/1.png\na/2.png\n")

    def test_unreadable_list(self, tmp_path, images):
        with pytest.raises(UsageError, match=r"list '.*images' cannot be read: Is a directory"):
            load_list(str(images), str(images))

    def test_name_in_the_config(self, listed, images, tmp_path):
        expected = files(listed(b"0002.png\n0000.png\n"))
        (tmp_path / "a:b").symlink_to(tmp_path)
        name = f"list:{tmp_path / 'a:b' / 'index.txt'}:{images}"
        register([name])
        assert files(DatasetCatalog.get(name)) == expected

    def test_folder_is_not_searched(self, listed, monkeypatch):
        monkeypatch.setattr(os, "scandir", lambda *_: pytest.fail("a folder was listed"))
        assert len(listed(b"0002.png\n0000.png\n")) == 2

    def test_missing_image_is_skipped_in_training(self, tmp_path):
        from locreweight.data.loader import Stream, StreamPosition

        project = Project(tmp_path)
        index = tmp_path / "index.txt"
        index.write_text("0000.png\nmissing.png\n0001.png\n")
        project.set("DATASETS.UNLABELED", [f"list:{index}:{project.unlabeled}"])
        sets, dataset = project.read()
        assert len(sets.unlabeled) == 3
        samples = [dataset[StreamPosition(Stream.UNLABELED, i)] for i in range(3)]
        (message,) = {message for sample in samples for message in sample.read_errors}
        assert str(project.unlabeled / "missing.png") in message


class TestFolder:
    def test_order_of_paths(self, tmp_path):
        names = ["a/x.png", "a.b/x.png", "a-1/x.png", "a/b/x.png", "a.png", "a/b.png", "B/x.png"]
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(b"")
        assert files(load_folder(str(tmp_path))) == sorted(str(tmp_path / name) for name in names)

    def test_same_files_as_a_plain_search(self, tmp_path):
        """Every kind of entry at several depths, against Python's own walk."""
        for folder in ("", "a", "a/b", ".c", "d.png", "e\udcff"):
            make_entries(tmp_path / folder)
        (tmp_path / "a" / "up").symlink_to(tmp_path)
        (tmp_path / "linked").symlink_to(tmp_path / "a" / "b")
        assert files(load_folder(str(tmp_path))) == sorted(
            path
            for path in asked_about(str(tmp_path))
            if not any(part.startswith(".") for part in Path(path).relative_to(tmp_path).parts)
        )

    def test_companion_files_are_left_out(self, tmp_path):
        folder = make_folder(tmp_path / ".hidden" / "images", images=2)
        for name in ("._0000.png", ".0000.png", "__MACOSX/0000.png", ".cache/0000.png"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"")
        assert names(load_folder(str(folder))) == ["0000.png", "0001.png"]

    def test_no_disk_access_per_image(self, tmp_path, monkeypatch):
        folder = make_folder(tmp_path / "images", images=20)
        for ask in ("stat", "lstat"):
            real = getattr(os, ask)

            def checked(path, *args, real=real, **options):
                assert not str(path).endswith(".png")
                return real(path, *args, **options)

            monkeypatch.setattr(os, ask, checked)
        assert len(load_folder(str(folder))) == 20

    @pytest.mark.parametrize(
        "others",
        [
            ["config.yaml", ".lock"],
            ["config.yaml", "metrics.json"],
            ["config.yaml", "run.json", "log.txt"],
            ["config.yaml", "last_checkpoint"],
        ],
    )
    def test_folders_of_runs_are_left_out(self, tmp_path, caplog, others):
        for name in ("a.png", "b/c.png", "b/any name/panels/iter_0000001.jpg", "b/any name/x.png"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(b"")
        for name in others:
            (tmp_path / "b/any name" / name).write_bytes(b"")
        (tmp_path / "second-old-1").symlink_to(tmp_path / "b/any name")
        with caplog.at_level("INFO"):
            found = files(load_folder(str(tmp_path)))
        assert found == [str(tmp_path / "a.png"), str(tmp_path / "b/c.png")]
        assert f"left out 1 folders of runs in the image folder {tmp_path}" in caplog.text
        assert "any name" in caplog.text

    @pytest.mark.parametrize(
        "others", [[], ["config.yaml"], ["metrics.json", "run.json"], [".lock"], ["log.txt"]]
    )
    def test_similar_folders_are_not_left_out(self, tmp_path, caplog, others):
        for name in ("a.png", "b/c.png", "b/panels/d.png", *(f"b/{other}" for other in others)):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(b"")
        with caplog.at_level("INFO"):
            assert len(load_folder(str(tmp_path))) == 3
        assert "left out" not in caplog.text

    def test_pictures_of_a_run_in_the_image_folder_itself_are_left_out(self, tmp_path, caplog):
        names = ("a.png", "b/c.png", "panels/iter_0000001.jpg", "config.yaml", ".lock")
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(b"")
        with caplog.at_level("INFO"):
            found = files(load_folder(str(tmp_path)))
        assert found == [str(tmp_path / "a.png"), str(tmp_path / "b/c.png")]
        assert "left out 1 folders" in caplog.text

    def test_folder_with_output_of_runs_only_is_an_error(self, tmp_path):
        for name in ("run/panels/iter_0000001.jpg", "run/config.yaml", "run/run.json"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(b"")
        with pytest.raises(UsageError, match="no image"):
            load_folder(str(tmp_path))


def names(images):
    return [os.path.basename(image["file_name"]) for image in images]


def make_entries(folder):
    folder.mkdir(exist_ok=True)
    for name in ("a.png", "b.JPG", "c.txt", ".png", "..jpg", ".d.jpg", "e", "f.jpg.txt"):
        (folder / name).write_bytes(b"")
    os.mkfifo(folder / "pipe.png")
    (folder / "link.png").symlink_to("a.png")
    (folder / "text.png").symlink_to("c.txt")
    (folder / "nowhere.png").symlink_to("nothing")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "device.png").symlink_to("/dev/null")


def asked_about(folder):
    """Every image in a folder, each found out by its own path."""
    visited = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        if os.path.realpath(parent) in visited:
            folders.clear()
            continue
        visited.add(os.path.realpath(parent))
        for path in (os.path.join(parent, name) for name in names):
            if os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES and (
                os.path.isfile(path) or not os.path.exists(path)
            ):
                yield path
