"""The command line of train_net.py."""

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
from tests.engine.tiny_training import TRAINING, make_datasets, restored_loggers_and_signals
from tests.modeling.tiny_model import TINY, as_options

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "train_net.py"
BASE = ROOT / "configs/Base-LocReweight.yaml"


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    return make_datasets(tmp_path_factory.mktemp("datasets"))


@pytest.fixture
def make_arguments(datasets, tmp_path):
    """Builds a command line that trains the tiny detector into the test's folder."""
    settings = TINY | TRAINING | datasets | {"OUTPUT_DIR": tmp_path, "SOLVER.MAX_ITER": 3}

    def make(*flags, **changed):
        return ["--config-file", str(BASE), *flags, *as_options(settings | changed)]

    return make


def run_script(*arguments: str) -> None:
    """Run the script in this process, as ``python train_net.py`` does."""
    with pytest.MonkeyPatch.context() as patch, restored_loggers_and_signals():
        patch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        # Locks that are kept here only, so that they end with the run.
        patch.setattr("locreweight.engine.startup_checks._locks", {})
        runpy.run_path(str(SCRIPT), run_name="__main__")


def error_of(*arguments: str) -> str:
    """The message that the script exits with. Python prints it and exits with code 1."""
    with pytest.raises(SystemExit) as exit_:
        run_script(*arguments)
    assert isinstance(exit_.value.code, str)
    return exit_.value.code


def test_train_resume_and_evaluate(make_arguments, tmp_path):
    log = tmp_path / "log.txt"

    def metrics():
        return [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]

    run_script(*make_arguments())
    files = {"model_final.pth", "config.yaml", "log.txt", "metrics.json", "run.json"}
    assert files <= set(os.listdir(tmp_path))
    (results,) = [line for line in metrics() if "bbox/AP" in line]
    assert "student/bbox/AP" in results
    assert "Effective values on 1 process(es)" in log.read_text()
    assert f"Detectron2 {describe_detectron2()}" in log.read_text()

    run_script(*make_arguments("--resume", **{"SOLVER.MAX_ITER": 5}))
    assert "resumed after iteration 2" in log.read_text()
    assert metrics()[-1]["iteration"] == 4

    weights = {"MODEL.WEIGHTS": tmp_path / "model_final.pth"}
    run_script(*make_arguments("--eval-only", **weights))
    assert "evaluating the teacher" in log.read_text()
    assert "copypaste: AP,AP50,AP75" in log.read_text()


def test_resume_with_another_copy_of_detectron2(make_arguments, tmp_path):
    """A checkpoint depends neither on Detectron2's version nor on its folder."""
    run_script(*make_arguments())
    copy = tmp_path / "copy" / "detectron2"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(detectron2.__file__).parent, copy, ignore=ignored)
    text = (copy / "__init__.py").read_text()
    (copy / "__init__.py").write_text(re.sub('__version__ = ".*"', '__version__ = "9.8"', text))
    path = os.pathsep.join([str(copy.parent), os.environ.get("PYTHONPATH", "")])
    arguments = make_arguments("--resume", **{"SOLVER.MAX_ITER": 5})
    command = [sys.executable, str(SCRIPT), *arguments]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=True)
    assert "resumed after iteration 2" in (tmp_path / "log.txt").read_text()
    starts = read_run_records(tmp_path)
    assert starts[0].versions["Detectron2"] == describe_detectron2()
    assert starts[1].versions["Detectron2"].startswith("9.8 (a folder on the Python path")


def test_method_is_found_by_its_short_name(make_arguments, tmp_path):
    run_script(*make_arguments("--method", "published/stac-coco", **{"SOLVER.MAX_ITER": 1}))
    assert "AUGMENTATION_POLICY: StacPolicy" in (tmp_path / "config.yaml").read_text()


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
        ([], {"OUTPUT_DIR": "/dev/null/run"}, "cannot write to OUTPUT_DIR '/dev/null/run'"),
        (["--eval-only"], {"MODEL.WEIGHTS": ""}, "--eval-only needs MODEL.WEIGHTS"),
        (["--method", "stca"], {}, "method 'stca' does not exist"),
    ],
)
def test_mistakes_end_with_one_line(make_arguments, capfd, flags, changed, message):
    error = error_of(*make_arguments(*flags, **changed))
    assert error.startswith("error: ")
    assert message in error
    assert "\n" not in error
    assert "Traceback" not in "".join(capfd.readouterr())


def test_missing_config_file_is_named():
    error = error_of("--config-file", "none.yaml")
    assert error == "error: config file 'none.yaml' does not exist"


@pytest.mark.slow
def test_mistakes_end_with_one_line_and_code_1_in_two_processes(make_arguments):
    flags = ("--num-gpus", "2", "--dist-url", "auto")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *make_arguments(*flags, **{"DATASETS.UNLABELED": ()})],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 1
    assert "error: there are no unlabeled images" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
