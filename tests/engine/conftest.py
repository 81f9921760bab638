"""Fixtures for trainings of the tiny detector."""

import json
import subprocess
import sys

import pytest

from tests.engine.tiny_training import build_trainer, make_datasets, training_config
from tests.tools.conftest import run  # noqa: F401  (a fixture)


@pytest.fixture(scope="session")
def datasets(tmp_path_factory):
    return make_datasets(tmp_path_factory.mktemp("datasets"))


@pytest.fixture
def make_trainer(datasets, tmp_path):
    """Builds trainers that share the test's output folder; ``resume`` continues an earlier one."""

    def make(settings=None, **how):
        return build_trainer(training_config(datasets, tmp_path, settings), **how)

    return make


@pytest.fixture(scope="session")
def pretend_folder(tmp_path_factory):
    """Output folder of the trainings on a pretend device."""
    folder = tmp_path_factory.mktemp("pretend")
    program = [sys.executable, "-m", "tests.engine.pretend_trainings", str(folder)]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def device_results(pretend_folder):
    """Name of a training -> fields of ``Result``."""
    return json.loads((pretend_folder / "results.json").read_text())
