"""Processes that do not have the same code, config, data or output folder."""

import ast
import json
import shutil
import socket
from pathlib import Path

import pytest

from tests.engine import differing_processes
from tests.in_two_processes import run_in_two_processes

HOST = socket.gethostname()


@pytest.fixture(scope="module")
def results(datasets, tmp_path_factory):
    """The errors of each case in both processes, and the files that are left in the folder."""
    folder = tmp_path_factory.mktemp("agreement")
    _, json_file, images = datasets["DATASETS.TRAIN"][0].split(":")
    content = json.loads(Path(json_file).read_text())
    content["annotations"][0]["bbox"][2] += 1
    other = folder / "other" / Path(json_file).name
    other.parent.mkdir()
    other.write_text(json.dumps(content))
    shutil.copytree(images, folder / "images")
    changed = {"DATASETS.TRAIN": [f"coco:{other}:{folder / 'images'}"]}
    run_in_two_processes(differing_processes.run, datasets, changed, folder)
    return [ast.literal_eval((folder / f"errors{rank}.txt").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", ["same setup", "same data", "shared folder", "no error"])
def test_processes_that_agree_raise_nothing(results, case):
    assert [result["errors"][case] for result in results] == ["", ""]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("flag", "--resume is True instead of False"),
        ("config", "SOLVER.BASE_LR is 0.02 instead of 0.01"),
        ("many keys", "and 2 more"),
        ("code", "the file locreweight/changed.py is "),
        ("code", "the file locreweight/new1.py is e3b0c44298fc instead of missing"),
        ("code", "the file locreweight/new0.py is missing instead of e3b0c44298fc"),
        ("other annotations", "the list of labeled boxes is 5 images ("),
    ],
)
def test_difference_is_named_in_both_processes(results, case, words):
    first, second = (result["errors"][case] for result in results)
    assert first == second
    assert first.startswith(f"process 1 on {HOST} differs from process 0 on {HOST}: ")
    assert words in first
    assert "same.py" not in first


def test_only_what_differs_is_named(results):
    for case in ("flag", "config", "other annotations"):
        assert results[0]["errors"][case].count("instead of") == 1


def test_folder_that_is_not_shared_is_an_error_of_both_processes(results):
    for result in results:
        error = result["errors"]["own folder"]
        assert f"is another folder for process 1 on {HOST} than for the main process" in error
        assert "on a disk that all hosts share" in error


def test_check_of_the_folder_leaves_no_file(results):
    assert results[0]["left"] == []


def test_error_of_one_process_is_raised_in_all(results):
    name = "error of the second process"
    errors = [result["errors"][name] for result in results]
    own = "data/train.json does not exist"
    assert errors == [f"process 1 on {HOST}: {own}", own]


def test_processes_that_fail_raise_their_own_errors(results):
    errors = [result["errors"]["error of both processes"] for result in results]
    assert errors == [f"own error of process {rank}" for rank in range(2)]
