"""What a run was started with is kept, each time it is started."""

import json
import shlex

import pytest
import torch

from locreweight.engine.run_record import read_run_records, write_run_record


def test_each_start_is_kept(tmp_path):
    write_run_record(tmp_path, ["train_net.py", "--config-file", "a b.yaml"], processes=2)
    write_run_record(tmp_path, ["train_net.py", "--resume"], processes=1)
    first, second = read_run_records(tmp_path)
    assert shlex.split(first.command) == ["python", "train_net.py", "--config-file", "a b.yaml"]
    assert second.command == "python train_net.py --resume"
    assert (first.processes, second.processes) == (2, 1)
    assert first.versions["PyTorch"] == torch.__version__


def test_a_run_without_a_record_has_none(tmp_path):
    assert read_run_records(tmp_path) == []


def test_outside_of_git_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    write_run_record(tmp_path, ["train_net.py"], processes=1)
    assert read_run_records(tmp_path)[0].commit == ""


@pytest.mark.parametrize("private", ["USER", "HOSTNAME"])
def test_users_and_hosts_are_not_recorded(tmp_path, monkeypatch, private):
    monkeypatch.setenv(private, "somebody-private")
    write_run_record(tmp_path, ["train_net.py"], processes=1)
    text = (tmp_path / "run.json").read_text()
    assert "somebody-private" not in text
    assert json.loads(text)[0]["machine"].keys() == {"system", "CPU", "cores", "GPUs"}
