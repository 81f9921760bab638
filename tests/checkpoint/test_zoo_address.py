"""Addresses of the zoo become local files whose content is the published one."""

import logging
import os
from pathlib import Path

import pytest
from detectron2.utils.file_io import PathManager

import locreweight.modeling  # noqa: F401
from locreweight import model_zoo
from locreweight.checkpoint.loading import check_weights_exist
from locreweight.checkpoint.zoo import CONFIG, INDEX, VARIABLE, fetch, find_entry
from locreweight.config import load_config
from locreweight.errors import UsageError
from tests.checkpoint.serving import serving, write_entry


@pytest.fixture
def zoo(tmp_path):
    folder = tmp_path / "zoo"
    write_entry(folder, "a/small")
    return folder


@pytest.fixture(params=["folder", "file server", "http"])
def anywhere(request, zoo, monkeypatch):
    """The zoo at each kind of address."""
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


def test_weights_and_config_are_had_by_name(anywhere):
    assert content_of("locreweight://a/small") == b"weights"
    assert content_of("locreweight://a/small.yaml") == b"VERSION: 2\n"
    assert PathManager.isfile(PathManager.get_local_path("locreweight://a/small"))
    assert model_zoo.names() == ["a/small"]
    assert model_zoo.describe("a/small.yaml").class_names == ["cat", "dog"]
    assert Path(model_zoo.get_config_file("a/small.yaml")).read_text() == "VERSION: 2\n"
    url = model_zoo.get_checkpoint_url("a/small.yaml")
    assert url == os.environ[VARIABLE].rstrip("/") + "/a/small/model.safetensors"


def test_the_command_line_takes_configs_of_the_zoo(anywhere):
    assert load_config("locreweight://a/small.yaml", []).VERSION == 2
    with pytest.raises(UsageError, match=r"its config is locreweight://a/small\.yaml"):
        load_config("locreweight://a/small", [])


def test_a_zoo_does_not_say_whom_to_trust(zoo, monkeypatch):
    """Reading what it names would otherwise run what strangers wrote."""
    monkeypatch.setenv(VARIABLE, str(zoo))
    checks = "{CHECKS: {ALLOW_OUTSIDE_PATHS: True}}"
    text = f"MODEL: {{TRUST_WEIGHTS: True}}\nDATASETS: {checks}\nVERSION: 2\n"
    write_entry(zoo, "a/small", config=text)
    for cfg in (load_config("locreweight://a/small.yaml", []), model_zoo.get_config("a/small")):
        assert not cfg.MODEL.TRUST_WEIGHTS and not cfg.DATASETS.CHECKS.ALLOW_OUTSIDE_PATHS
    mine = load_config("locreweight://a/small.yaml", ["MODEL.TRUST_WEIGHTS", "True"])
    assert mine.MODEL.TRUST_WEIGHTS


@pytest.mark.parametrize("base", ["other.yaml", "http://127.0.0.1:9/base.yaml"])
def test_a_config_of_the_zoo_stands_alone(zoo, monkeypatch, base):
    """What it were built on has no checksum."""
    monkeypatch.setenv(VARIABLE, str(zoo))
    write_entry(zoo, "a/small", config=f"_BASE_: {base}\nVERSION: 2\n")
    with pytest.raises(UsageError, match=r"a/small\.yaml has a _BASE_"):
        load_config("locreweight://a/small.yaml", [])


def test_an_unknown_model_is_told_with_those_there_are(anywhere):
    with pytest.raises(UsageError, match="has no model 'a/smal'; did you mean a/small"):
        find_entry("a/smal")
    with pytest.raises(UsageError, match="it has: a/small"):
        find_entry("xyz")


@pytest.mark.parametrize("name", ["../zoo/a/small", "a/../a/small", "/etc/passwd", ""])
def test_names_do_not_leave_the_zoo(anywhere, name):
    with pytest.raises(UsageError, match="is not a valid model name"):
        PathManager.get_local_path(f"locreweight://{name}")


def test_a_damaged_file_is_refused(anywhere):
    (anywhere / "a/small/model.safetensors").write_bytes(b"weighty")
    with pytest.raises(UsageError, match=r"model\.safetensors is damaged or not the file"):
        PathManager.get_local_path("locreweight://a/small")
    (anywhere / "a/small" / CONFIG).write_text("VERSION: 1\n")
    with pytest.raises(UsageError, match=r"config\.yaml is damaged or not the file"):
        model_zoo.get_config_file("a/small")


def test_a_missing_file_is_told(anywhere):
    (anywhere / "a/small/model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"model\.safetensors cannot be downloaded") as error:
        check_weights_exist("locreweight://a/small")
    assert "\n" not in str(error.value)


def test_where_there_is_no_zoo_it_is_told(anywhere):
    (anywhere / INDEX).unlink()
    with pytest.raises(UsageError, match=f"there is no model zoo at {VARIABLE}="):
        find_entry("a/small")


def test_the_variable_is_needed():
    with pytest.raises(UsageError, match=f"{VARIABLE} is not set: set it to the folder"):
        find_entry("a/small")


def test_nothing_is_written_to_a_zoo(server):
    with pytest.raises(UsageError, match=r"tools/publish\.py"):
        PathManager.open("locreweight://a/small", "wb")


# --- the cache of what servers gave ---------------------------------------------------------------


def test_a_file_is_fetched_once_and_the_index_each_time(server):
    for _ in range(3):
        content_of("locreweight://a/small")
    assert server.asked.count("/a/small/model.safetensors") == 1
    assert server.asked.count("/index.json") == 3


def test_a_damaged_copy_is_fetched_again(server, caplog):
    path = PathManager.get_local_path("locreweight://a/small")
    with open(path, "wb") as file:
        file.write(b"weigh")
    with caplog.at_level(logging.WARNING):
        assert content_of("locreweight://a/small") == b"weights"
    assert f"the cached copy {path} is damaged" in caplog.text
    assert server.asked.count("/a/small/model.safetensors") == 2


def test_a_file_that_stays_damaged_is_fetched_twice_and_not_kept(server, zoo, cache):
    (zoo / "a/small/model.safetensors").write_bytes(b"weighty")
    with pytest.raises(UsageError, match="damaged"):
        PathManager.get_local_path("locreweight://a/small")
    assert server.asked.count("/a/small/model.safetensors") == 2
    assert not list(cache.rglob("*.safetensors"))


def test_a_model_that_was_published_anew_is_fetched_anew(server, zoo):
    content_of("locreweight://a/small")
    write_entry(zoo, "a/small", b"better weights")
    assert content_of("locreweight://a/small") == b"better weights"


def test_a_known_model_can_be_used_while_the_server_is_gone(zoo, monkeypatch, caplog):
    with serving(zoo) as server:
        monkeypatch.setenv(VARIABLE, server.address)
        content_of("locreweight://a/small")
    with caplog.at_level(logging.WARNING, logger="locreweight"):
        assert content_of("locreweight://a/small") == b"weights"
    assert "using the cached index" in caplog.text


def test_without_a_copy_a_server_that_is_gone_is_an_error(zoo, monkeypatch):
    with serving(zoo) as server:
        monkeypatch.setenv(VARIABLE, server.address)
    with pytest.raises(UsageError, match="there is no model zoo at .*refused"):
        content_of("locreweight://a/small")


def test_zoos_do_not_share_their_copies(zoo, tmp_path, monkeypatch):
    write_entry(tmp_path / "other", "a/small", b"others")
    with serving(zoo) as first, serving(tmp_path / "other") as second:
        for server, expected in ((first, b"weights"), (second, b"others")):
            monkeypatch.setenv(VARIABLE, server.address)
            assert content_of("locreweight://a/small") == expected
        assert second.asked.count("/a/small/model.safetensors") == 1


def test_an_entry_of_one_zoo_is_not_taken_from_another(zoo, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(zoo))
    entry = find_entry("a/small")
    write_entry(tmp_path / "other", "a/small", b"others")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "other"))
    with pytest.raises(UsageError, match="damaged or not the file"):
        fetch(entry, entry.weights)
