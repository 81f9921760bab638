"""Records of how a run was started."""

import json
import shlex
import subprocess

import pytest
import torch

from locreweight.engine import run_record
from locreweight.engine.run_record import RunRecord, read_run_records, write_run_record
from locreweight.installed_detectron2 import describe_detectron2


def test_each_start_is_recorded(tmp_path):
    write_run_record(tmp_path, ["train_net.py", "--config-file", "a b.yaml"], processes=2)
    write_run_record(tmp_path, ["train_net.py", "--resume"], processes=1)
    first, second = read_run_records(tmp_path)
    assert shlex.split(first.command) == ["python", "train_net.py", "--config-file", "a b.yaml"]
    assert second.command == "python train_net.py --resume"
    assert (first.processes, second.processes) == (2, 1)
    assert first.versions["PyTorch"] == torch.__version__
    assert first.versions["Detectron2"] == describe_detectron2()


def test_missing_record_is_empty(tmp_path):
    assert read_run_records(tmp_path) == []


def test_commit_is_empty_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    write_run_record(tmp_path, ["train_net.py"], processes=1)
    assert read_run_records(tmp_path)[0].commit == ""


def test_uncommitted_code_is_marked(tmp_path, monkeypatch):
    """In a new repository: the record describes the one that contains the module."""
    engine = tmp_path / "engine"
    engine.mkdir()
    (engine / "run_record.py").touch()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=b"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(run_record, "__file__", str(engine / "run_record.py"))

    def changed():
        write_run_record(tmp_path / "out", ["train_net.py"], processes=1)
        return read_run_records(tmp_path / "out")[-1].commit.endswith("+changes")

    (tmp_path / "out").mkdir()
    (tmp_path / "mine.yaml").touch()
    assert not changed()
    (tmp_path / "mine.py").touch()
    assert changed()
    (tmp_path / "mine.py").unlink()
    (engine / "run_record.py").write_text("pass\n")
    assert changed()


@pytest.mark.parametrize(
    ("gpus", "expected"), [("none", "2 x CPU"), ("8 x H100", "2 x CPU, 8 x H100")]
)
def test_processors_describe_the_machine(gpus, expected):
    machine = {"CPU": "CPU", "cores": "2", "GPUs": gpus}
    assert RunRecord("", "", "", 1, machine=machine).processors == expected


@pytest.mark.parametrize("private", ["USER", "HOSTNAME"])
def test_users_and_hosts_are_not_recorded(tmp_path, monkeypatch, private):
    monkeypatch.setenv(private, "somebody-private")
    write_run_record(tmp_path, ["train_net.py"], processes=1)
    text = (tmp_path / "run.json").read_text()
    assert "somebody-private" not in text
    assert json.loads(text)[0]["machine"].keys() == {"system", "CPU", "cores", "GPUs"}
