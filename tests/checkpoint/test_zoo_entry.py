"""What a zoo says of its models: written, read again, and refused when it makes no sense."""

import hashlib
import json

import pytest

from locreweight.checkpoint.zoo import (
    CONFIG,
    ENTRY,
    INDEX,
    ZooEntry,
    check_name,
    parse_index,
    write_index,
)
from locreweight.errors import UsageError
from locreweight.file_io import sha256_of
from tests.checkpoint.serving import write_entry


@pytest.mark.parametrize("name", ["bccd-small", "COCO/frcnn_R_50_1x", "a.b", "7"])
def test_names_may_end_as_detectron2s_do(name):
    assert check_name(name) == check_name(f"{name}.yaml") == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../a", "a/../b", "/a", "a/", "a//b", ".a", "a/.b", "a b", "a\n", "ä", "a?b",
     "~a", "a:b", "a\\b", "a%2e", "index.json", "README.md"],
)  # fmt: skip
def test_names_that_could_leave_the_zoo_are_refused(name):
    with pytest.raises(UsageError, match="is not a valid model name"):
        check_name(name)


def test_the_digest_is_that_of_the_content(tmp_path):
    content = bytes(range(256)) * 10000  # more than is read at a time
    (tmp_path / "file").write_bytes(content)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_the_index_lists_what_lies_in_the_folder(tmp_path):
    written = [write_entry(tmp_path, name) for name in ("b", "a/c")]
    assert write_index(tmp_path) == [written[1], written[0]]
    text = (tmp_path / INDEX).read_text()
    assert parse_index(text, "here") == {entry.name: entry for entry in written}
    (tmp_path / "b" / ENTRY).unlink()
    (tmp_path / ".unfinished").mkdir()
    (tmp_path / ".unfinished" / ENTRY).write_text("half an en")
    assert [entry.name for entry in write_index(tmp_path)] == ["a/c"]


def test_fields_of_later_versions_are_ignored(tmp_path):
    entry = write_entry(tmp_path, "a")
    content = json.loads(entry.as_json()) | {"of a later version": 1}
    assert ZooEntry.from_dict(content, "here") == entry


GOOD = {"model.safetensors": "0" * 64, CONFIG: "1" * 64}


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../a"},
        {"name": 3},
        {"sha256": {**GOOD, "../../etc/passwd": "0" * 64}},
        {"sha256": {**GOOD, "a/b": "0" * 64}},
        {"sha256": {**GOOD, "c": "0" * 8}},
        {"sha256": {**GOOD, "c": 3}},
        {"sha256": {CONFIG: "1" * 64}},
        {"sha256": []},
        {"weights": "../other"},
        {"weights": CONFIG},
        {"class_names": 5},
        {"class_names": [5]},
        {"class_names": "cat"},
    ],
    ids=str,
)
def test_entries_that_make_no_sense_are_refused_by_name(tmp_path, change):
    content = json.loads(write_entry(tmp_path, "a").as_json()) | {"sha256": GOOD}
    ZooEntry.from_dict(content, "here")
    with pytest.raises(UsageError, match="(here|cannot be the name)") as error:
        ZooEntry.from_dict(content | change, "here")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<html>log in first</html>", "damaged or does not belong to a model zoo"),
        ("[" * 100_000, "damaged or does not belong to a model zoo"),
        ("[]", "no list of models"),
        ('{"format": 1, "models": 3}', "no list of models"),
        ('{"format": 1, "models": [3]}', "damaged"),
        ('{"format": 2, "models": []}', "update locreweight"),
    ],
)
def test_an_index_that_is_none_is_refused(text, words):
    with pytest.raises(UsageError, match=words):
        parse_index(text, "http://somewhere/index.json")
