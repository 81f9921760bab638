"""Tests of the index of a model zoo, and of addresses that resolve to verified local files."""

import json
import logging
import os
from pathlib import Path

import pytest
from detectron2.utils.file_io import PathManager

import locreweight.modeling  # noqa: F401
from locreweight import model_zoo
from locreweight.checkpoint.loading import check_weights_exist
from locreweight.checkpoint.zoo import (
    CONFIG,
    ENTRY,
    INDEX,
    VARIABLE,
    ZooEntry,
    check_name,
    fetch,
    find_entry,
    parse_index,
    write_index,
)
from locreweight.config import load_config
from locreweight.errors import UsageError
from tests.checkpoint.serving import serving, write_entry

# --- index ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bccd-small", "COCO/frcnn_R_50_1x", "a.b", "7"])
def test_check_name_accepts_names_with_and_without_yaml(name):
    assert check_name(name) == check_name(f"{name}.yaml") == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../a", "a/../b", "/a", "a/", "a//b", ".a", "a/.b", "a b", "a\n", "ä", "a?b",
     "~a", "a:b", "a\\b", "a%2e", "index.json", "README.md"],
)  # fmt: skip
def test_check_name_rejects_invalid_names(name):
    with pytest.raises(UsageError, match="is not a valid model name"):
        check_name(name)


def test_write_index_lists_all_entries_in_the_folder(tmp_path):
    written = [write_entry(tmp_path, name) for name in ("b", "a/c")]
    assert write_index(tmp_path) == [written[1], written[0]]
    text = (tmp_path / INDEX).read_text()
    assert parse_index(text, "here") == {entry.name: entry for entry in written}
    (tmp_path / "b" / ENTRY).unlink()
    (tmp_path / ".incomplete").mkdir()
    (tmp_path / ".incomplete" / ENTRY).write_text("half an en")
    assert [entry.name for entry in write_index(tmp_path)] == ["a/c"]


def test_from_dict_ignores_fields_of_later_versions(tmp_path):
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
def test_from_dict_rejects_invalid_entries(tmp_path, change):
    content = json.loads(write_entry(tmp_path, "a").as_json()) | {"sha256": GOOD}
    ZooEntry.from_dict(content, "here")
    with pytest.raises(UsageError, match="here|is not a valid model name") as error:
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
def test_parse_index_rejects_invalid_files(text, words):
    with pytest.raises(UsageError, match=words):
        parse_index(text, "http://somewhere/index.json")


# --- addresses ------------------------------------------------------------------------------------


@pytest.fixture
def zoo(tmp_path):
    folder = tmp_path / "zoo"
    write_entry(folder, "a/small")
    return folder


@pytest.fixture(params=["folder", "file server", "http"])
def anywhere(request, zoo, monkeypatch):
    """A zoo, with each kind of address in the environment variable."""
    if request.param == "http":
        with serving(zoo) as server:
            monkeypatch.setenv(VARIABLE, server.address + "/")
            yield zoo
    else:
        monkeypatch.setenv(VARIABLE, f"file://{zoo}" if "server" in request.param else str(zoo))
        yield zoo


@pytest.fixture
def server(zoo, monkeypatch):
    with serving(zoo) as running:
        monkeypatch.setenv(VARIABLE, running.address)
        yield running


def content_of(address):
    with PathManager.open(address, "rb") as file:
        return file.read()


def test_weights_and_config_are_found_by_name(anywhere):
    assert content_of("locreweight://a/small") == b"weights"
    assert content_of("locreweight://a/small.yaml") == b"VERSION: 2\n"
    assert PathManager.isfile(PathManager.get_local_path("locreweight://a/small"))
    assert model_zoo.names() == ["a/small"]
    assert model_zoo.describe("a/small.yaml").class_names == ["cat", "dog"]
    assert Path(model_zoo.get_config_file("a/small.yaml")).read_text() == "VERSION: 2\n"
    url = model_zoo.get_checkpoint_url("a/small.yaml")
    assert url == os.environ[VARIABLE].rstrip("/") + "/a/small/model.safetensors"


def test_load_config_takes_addresses_of_configs(anywhere):
    assert load_config("locreweight://a/small.yaml", []).VERSION == 2
    with pytest.raises(UsageError, match=r"its config is locreweight://a/small\.yaml"):
        load_config("locreweight://a/small", [])


def test_configs_of_the_zoo_cannot_disable_safety_checks(zoo, monkeypatch):
    """Otherwise files by unknown authors could execute code."""
    monkeypatch.setenv(VARIABLE, str(zoo))
    checks = "{CHECKS: {ALLOW_OUTSIDE_PATHS: True}}"
    text = f"MODEL: {{TRUST_WEIGHTS: True}}\nDATASETS: {checks}\nVERSION: 2\n"
    write_entry(zoo, "a/small", config=text)
    for cfg in (load_config("locreweight://a/small.yaml", []), model_zoo.get_config("a/small")):
        assert not cfg.MODEL.TRUST_WEIGHTS and not cfg.DATASETS.CHECKS.ALLOW_OUTSIDE_PATHS
    mine = load_config("locreweight://a/small.yaml", ["MODEL.TRUST_WEIGHTS", "True"])
    assert mine.MODEL.TRUST_WEIGHTS


@pytest.mark.parametrize("base", ["other.yaml", "http://127.0.0.1:9/base.yaml"])
def test_configs_of_the_zoo_cannot_have_a_base(zoo, monkeypatch, base):
    """The base config would have no checksum."""
    monkeypatch.setenv(VARIABLE, str(zoo))
    write_entry(zoo, "a/small", config=f"_BASE_: {base}\nVERSION: 2\n")
    with pytest.raises(UsageError, match=r"a/small\.yaml has a _BASE_"):
        load_config("locreweight://a/small.yaml", [])


def test_find_entry_suggests_names_for_an_unknown_model(anywhere):
    with pytest.raises(UsageError, match="has no model 'a/smal'; did you mean a/small"):
        find_entry("a/smal")
    with pytest.raises(UsageError, match="it has: a/small"):
        find_entry("xyz")


@pytest.mark.parametrize("name", ["../zoo/a/small", "a/../a/small", "/etc/passwd", ""])
def test_names_cannot_lead_out_of_the_zoo(anywhere, name):
    with pytest.raises(UsageError, match="is not a valid model name"):
        PathManager.get_local_path(f"locreweight://{name}")


def test_damaged_files_are_rejected(anywhere):
    (anywhere / "a/small/model.safetensors").write_bytes(b"weighty")
    with pytest.raises(UsageError, match=r"model\.safetensors is damaged or not the file"):
        PathManager.get_local_path("locreweight://a/small")
    (anywhere / "a/small" / CONFIG).write_text("VERSION: 1\n")
    with pytest.raises(UsageError, match=r"config\.yaml is damaged or not the file"):
        model_zoo.get_config_file("a/small")


def test_missing_files_are_reported(anywhere):
    (anywhere / "a/small/model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"model\.safetensors cannot be downloaded") as error:
        check_weights_exist("locreweight://a/small")
    assert "\n" not in str(error.value)


def test_missing_index_is_reported(anywhere):
    (anywhere / INDEX).unlink()
    with pytest.raises(UsageError, match=f"there is no model zoo at {VARIABLE}="):
        find_entry("a/small")


def test_missing_environment_variable_is_reported():
    with pytest.raises(UsageError, match=f"{VARIABLE} is not set: set it to the folder"):
        find_entry("a/small")


def test_addresses_are_read_only(server):
    with pytest.raises(UsageError, match=r"tools/publish\.py"):
        PathManager.open("locreweight://a/small", "wb")


# --- cache of downloads ---------------------------------------------------------------------------


def test_files_are_downloaded_once_and_the_index_each_time(server):
    for _ in range(3):
        content_of("locreweight://a/small")
    assert server.requests.count("/a/small/model.safetensors") == 1
    assert server.requests.count("/index.json") == 3


def test_damaged_cached_file_is_downloaded_again(server, caplog):
    path = PathManager.get_local_path("locreweight://a/small")
    with open(path, "wb") as file:
        file.write(b"weigh")
    with caplog.at_level(logging.WARNING):
        assert content_of("locreweight://a/small") == b"weights"
    assert f"the cached copy {path} is damaged" in caplog.text
    assert server.requests.count("/a/small/model.safetensors") == 2


def test_file_that_stays_damaged_is_not_cached(server, zoo, cache):
    (zoo / "a/small/model.safetensors").write_bytes(b"weighty")
    with pytest.raises(UsageError, match="damaged"):
        PathManager.get_local_path("locreweight://a/small")
    assert server.requests.count("/a/small/model.safetensors") == 2
    assert not list(cache.rglob("*.safetensors"))


def test_replaced_model_is_downloaded_again(server, zoo):
    content_of("locreweight://a/small")
    write_entry(zoo, "a/small", b"better weights")
    assert content_of("locreweight://a/small") == b"better weights"


def test_cached_model_can_be_used_without_the_server(zoo, monkeypatch, caplog):
    with serving(zoo) as server:
        monkeypatch.setenv(VARIABLE, server.address)
        content_of("locreweight://a/small")
    with caplog.at_level(logging.WARNING, logger="locreweight"):
        assert content_of("locreweight://a/small") == b"weights"
    assert "using the cached index" in caplog.text


def test_missing_server_without_a_cache_raises(zoo, monkeypatch):
    with serving(zoo) as server:
        monkeypatch.setenv(VARIABLE, server.address)
    with pytest.raises(UsageError, match="there is no model zoo at .*refused"):
        content_of("locreweight://a/small")


def test_zoos_do_not_share_cached_files(zoo, tmp_path, monkeypatch):
    write_entry(tmp_path / "other", "a/small", b"others")
    with serving(zoo) as first, serving(tmp_path / "other") as second:
        for server, expected in ((first, b"weights"), (second, b"others")):
            monkeypatch.setenv(VARIABLE, server.address)
            assert content_of("locreweight://a/small") == expected
        assert second.requests.count("/a/small/model.safetensors") == 1


def test_fetch_rejects_a_file_of_another_zoo(zoo, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(zoo))
    entry = find_entry("a/small")
    write_entry(tmp_path / "other", "a/small", b"others")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "other"))
    with pytest.raises(UsageError, match="damaged or not the file"):
        fetch(entry, entry.weights)
