"""The command line as a user runs it."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import detectron2
import pytest

from locreweight.engine.run_record import read_run_records
from locreweight.installed_detectron2 import describe_detectron2
from tests.engine.tiny_training import TRAINING, logging_of_its_own, make_datasets
from tests.modeling.tiny_model import TINY, as_options

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "train_net.py"
BASE = ROOT / "configs/Base-LocReweight.yaml"


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    return make_datasets(tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The output of one run that all tests share, in order: trained, resumed, evaluated."""
    return tmp_path_factory.mktemp("output")


@pytest.fixture
def arguments(datasets, folder):
    """Of a command line that trains the tiny detector; further ones may follow."""
    settings = TINY | TRAINING | datasets | {"OUTPUT_DIR": folder, "SOLVER.MAX_ITER": 3}

    def make(*flags, **changed):
        return ["--config-file", str(BASE), *flags, *as_options(settings | changed)]

    return make


def run(*arguments: str, timeout: int = 600, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **variables},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def metrics_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


# --- train, resume, evaluate ----------------------------------------------------------------------


def test_it_trains(arguments, folder):
    done = run(*arguments())
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"model_final.pth", "config.yaml", "log.txt", "metrics.json"} <= set(os.listdir(folder))
    (results,) = [line for line in metrics_of(folder) if "bbox/AP" in line]
    assert "student/bbox/AP" in results
    log = (folder / "log.txt").read_text()
    assert "Effective values on 1 process(es)" in log
    assert f"Detectron2 {describe_detectron2()}" in log


def test_it_resumes_with_another_copy_of_detectron2(arguments, folder, tmp_path):
    """A checkpoint depends neither on Detectron2's version nor on its folder."""
    copy = tmp_path / "detectron2"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(detectron2.__file__).parent, copy, ignore=ignored)
    text = (copy / "__init__.py").read_text()
    (copy / "__init__.py").write_text(re.sub('__version__ = ".*"', '__version__ = "9.8"', text))
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = run(*arguments("--resume", **{"SOLVER.MAX_ITER": 5}), PYTHONPATH=path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "resumed after iteration 2" in done.stdout
    starts = read_run_records(folder)
    assert starts[0].versions["Detectron2"] == describe_detectron2()
    assert starts[1].versions["Detectron2"].startswith("9.8 (a folder on the Python path")
    assert metrics_of(folder)[-1]["iteration"] == 4


def test_it_evaluates_the_teacher_of_its_output(arguments, folder):
    weights = {"MODEL.WEIGHTS": folder / "model_final.pth"}
    done = run(*arguments("--eval-only", **weights))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "evaluating the teacher" in done.stdout
    assert "copypaste: AP,AP50,AP75" in done.stdout


# --- what the user has to put right ---------------------------------------------------------------


def error_of(*arguments: str) -> str:
    """What Python prints when the command line exits, with code 1, for being given a text."""
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(SystemExit) as exit_,
        logging_of_its_own(),
    ):
        patch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return exit_.value.code


@pytest.mark.parametrize(
    ("flags", "changed", "message"),
    [
        ([], {"SEMI.BURNIN_ITERS": 1}, "unknown config key SEMI.BURNIN_ITERS; did you mean"),
        ([], {"SOLVER.MAX_ITER": "many"}, "wrong type"),
        ([], {"DATASETS.TRAIN": ["coco:none.json:none"]}, "'none.json'"),
        ([], {"DATASETS.UNLABELED": ()}, "no unlabeled images"),
        ([], {"MODEL.ROI_HEADS.NUM_CLASSES": 4}, "MODEL.ROI_HEADS.NUM_CLASSES 3"),
        ([], {"MODEL.WEIGHTS": "none.pth"}, "'none.pth' does not exist"),
        (["--eval-only"], {"MODEL.WEIGHTS": "none.pth"}, "'none.pth' does not exist"),
        ([], {"OUTPUT_DIR": "/dev/null/run"}, "cannot write into OUTPUT_DIR '/dev/null/run'"),
        (["--eval-only"], {"MODEL.WEIGHTS": ""}, "--eval-only needs MODEL.WEIGHTS"),
    ],
)
def test_a_mistake_is_told_in_one_line(arguments, tmp_path, capfd, flags, changed, message):
    error = error_of(*arguments(*flags, **{"OUTPUT_DIR": tmp_path, **changed}))
    assert error.startswith("error: ")
    assert message in error
    assert "\n" not in error
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_config_file_that_is_not_there_is_told():
    error = error_of("--config-file", "none.yaml")
    assert error == "error: config file 'none.yaml' does not exist"


def test_a_mistake_is_told_in_two_processes_too(arguments, tmp_path):
    changed = {"OUTPUT_DIR": tmp_path, "DATASETS.UNLABELED": ()}
    done = run(*arguments("--num-gpus", "2", "--dist-url", "auto", **changed))
    assert done.returncode == 1
    assert "error: there are no unlabeled images" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
