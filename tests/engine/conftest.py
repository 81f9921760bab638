"""Data sets that all trainings of these tests share."""

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
    """A trainer with some settings, resumed or not; all of a test share an output folder."""

    def make(settings=None, resume=False):
        return build_trainer(training_config(datasets, tmp_path, settings), resume=resume)

    return make


@pytest.fixture(scope="session")
def pretended(tmp_path_factory):
    """Folder of what came of trainings on a device that is not the host."""
    folder = tmp_path_factory.mktemp("pretended")
    program = [sys.executable, "-m", "tests.engine.pretend_trainings", str(folder)]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def on_a_device(pretended):
    """Name of a training -> fields of ``Found``."""
    return json.loads((pretended / "results.json").read_text())
