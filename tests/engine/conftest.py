"""Data sets that all trainings of these tests share."""

import pytest

from tests.engine.tiny_training import build_trainer, make_datasets, training_config


@pytest.fixture(scope="session")
def datasets(tmp_path_factory):
    return make_datasets(tmp_path_factory.mktemp("datasets"))


@pytest.fixture
def make_trainer(datasets, tmp_path):
    """A trainer with some settings, resumed or not; all of a test share an output folder."""

    def make(settings=None, resume=False):
        return build_trainer(training_config(datasets, tmp_path, settings), resume=resume)

    return make
