"""The cache of parsed annotation files: same records and messages as without it."""

import json
import logging
import math
import pickle

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from tiny_data import edit_json, make_coco

from locreweight.data.datasets import record_cache
from locreweight.data.datasets.coco import load_coco
from locreweight.data.datasets.record_cache import NO_CACHE, RecordCache
from locreweight.errors import UsageError

NAME = "record_cache_test"


@pytest.fixture(autouse=True)
def _cache_small_files(monkeypatch):
    monkeypatch.setattr(record_cache, "MIN_CACHED_BYTES", 0)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run" / "dataset_cache"


@pytest.fixture
def cache(folder):
    folder.parent.mkdir()
    return RecordCache(folder)


@pytest.fixture
def coco(tmp_path):
    return make_coco(tmp_path / "data", images=4, boxes_per_image=3)


def load(coco, cache=NO_CACHE):
    """Records with their types, and the metadata."""
    MetadataCatalog.pop(NAME, None)
    records = load_coco(NAME, *map(str, coco), cache=cache)
    metadata = MetadataCatalog.get(NAME)
    return (
        repr(records),
        metadata.thing_classes,
        metadata.thing_dataset_id_to_contiguous_id,
    )


def cached_file(folder):
    [file] = folder.iterdir()
    return file


def make_odd(content):
    """Values that a conversion to arrays or texts would change."""
    boxes = [[1, 2.5, 3, 4], [math.nan, 0, math.inf, 1], ["1", None, [2], True], [10**400, 1, 2, 3]]
    for entry, box in zip(content["annotations"], boxes, strict=False):
        entry["bbox"] = box
    content["annotations"][0].update(iscrowd=True, area=7, attributes={"rotation": 30.5})
    content["annotations"][1].pop("iscrowd", None)
    content["annotations"][2]["image_id"] = 12345
    content["images"].append(
        {"id": 99, "file_name": "._a.jpg", "width": 1, "height": 1, "coco_url": "x"}
    )


class TestSameAsWithout:
    @pytest.mark.parametrize("edit", [lambda content: None, make_odd])
    def test_records_metadata_and_messages(self, coco, cache, caplog, edit):
        edit_json(coco[0], edit)
        results, messages = [], []
        caplog.set_level(logging.INFO, "locreweight.data.datasets.coco")
        for each in (NO_CACHE, cache, cache):
            caplog.clear()
            results.append(load(coco, each))
            messages.append([r.getMessage() for r in caplog.records if r.name.endswith(".coco")])
        assert results[0] == results[1] == results[2]
        assert messages[0] == messages[1] == messages[2]
        assert len(messages[0]) == (2 if edit is make_odd else 0)

    def test_second_read_does_not_parse(self, coco, cache, monkeypatch):
        expected = load(coco, cache)
        monkeypatch.setattr(json, "loads", None)
        assert load(coco, cache) == expected

    def test_bbox_mode_stays_an_enum(self, coco, cache):
        load(coco, cache)
        [annotation, *_] = load_coco(NAME, *map(str, coco), cache=cache)[0]["annotations"]
        assert annotation["bbox_mode"] is BoxMode.XYWH_ABS

    def test_error_is_the_same_and_not_cached(self, coco, cache, folder):
        def remove_id(content):
            del content["annotations"][-1]["id"]

        edit_json(coco[0], remove_id)
        errors = []
        for each in (NO_CACHE, cache, cache):
            with pytest.raises(UsageError, match=r"lacks \['id'\]") as error:
                load(coco, each)
            errors.append(str(error.value))
        assert len(set(errors)) == 1
        assert not folder.exists()

    def test_missing_images_are_found_although_the_file_is_cached(self, coco, cache, tmp_path):
        before = load_coco(NAME, *map(str, coco), cache=cache)
        moved = tmp_path / "moved"
        coco[1].rename(moved)
        after = load_coco(NAME, str(coco[0]), str(moved), cache=cache)
        assert [r["file_name"] for r in after] == [
            r["file_name"].replace(str(coco[1]), str(moved)) for r in before
        ]


class TestInvalid:
    def test_changed_annotations_are_read(self, coco, cache):
        load(coco, cache)
        edit_json(coco[0], lambda content: content["annotations"][0].update(bbox=[0, 0, 7, 7]))
        assert load(coco, cache) == load(coco)

    @pytest.mark.parametrize("content", [b"", b"short", b"x" * 100], ids=["empty", "short", "long"])
    def test_damaged_file_is_written_again(self, coco, cache, folder, caplog, content):
        expected = load(coco, cache)
        good = cached_file(folder).read_bytes()
        cached_file(folder).write_bytes(content)
        assert load(coco, cache) == expected
        assert "is not used: it is damaged" in caplog.text
        assert cached_file(folder).read_bytes() == good

    def test_every_truncation_and_flipped_byte_is_noticed(self, coco, cache, folder):
        expected = load(coco, cache)
        good = cached_file(folder).read_bytes()
        for i in range(0, len(good), 97):
            cached_file(folder).write_bytes(good[:i])
            assert load(coco, cache) == expected
            cached_file(folder).write_bytes(good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :])
            assert load(coco, cache) == expected

    def test_foreign_pickle_runs_no_code(self, coco, cache, folder, tmp_path, caplog):
        class Attack:
            def __reduce__(self):
                return (tmp_path.joinpath("attacked").touch, ())

        expected = load(coco, cache)
        content = pickle.dumps(Attack())
        digest = record_cache.hashlib.sha256(content).digest()
        cached_file(folder).write_bytes(digest + content)
        assert load(coco, cache) == expected
        assert "is not used: it contains" in caplog.text
        assert not (tmp_path / "attacked").exists()

    def test_other_version_of_the_parser(self, cache, folder):
        assert cache.get(b"{}", "a-1", lambda content: [1]) == [1]
        assert cache.get(b"{}", "a-2", lambda content: [2]) == [2]
        assert cache.get(b"{}", "a-1", pytest.fail) == [1]


class TestWhere:
    def test_small_files_are_not_cached(self, coco, cache, folder, monkeypatch):
        monkeypatch.setattr(record_cache, "MIN_CACHED_BYTES", coco[0].stat().st_size + 1)
        load(coco, cache)
        assert not folder.exists()

    def test_no_output_folder_is_created(self, coco, tmp_path):
        load(coco, RecordCache(tmp_path / "no_run" / "dataset_cache"))
        assert not (tmp_path / "no_run").exists()

    def test_full_disk(self, coco, cache, caplog, monkeypatch):
        def fail(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(record_cache, "atomic_write_bytes", fail)
        assert load(coco, cache) == load(coco)
        assert "cannot write the cache" in caplog.text


def teardown_module():
    MetadataCatalog.pop(NAME, None)
    assert NAME not in DatasetCatalog
