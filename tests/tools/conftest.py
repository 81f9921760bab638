"""One tiny training that is shared by the tests of all tools."""

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from locreweight.engine.run_record import write_run_record
from tests.engine.tiny_training import build_trainer, make_datasets, training_config
from tests.tiny_data import make_coco


@dataclass(frozen=True)
class TinyRun:
    """A finished training.

    Attributes:
        output: ``OUTPUT_DIR``.
        unlabeled: folder of five unlabeled images.
        test_images: folder of three test images.
        test_set: name of the test set.
    """

    output: Path
    unlabeled: Path
    test_images: Path
    test_set: str


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A training with panels, measurements of pseudo-labels, evaluations and checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    datasets = make_datasets(folder)
    ground_truth, unlabeled = make_coco(folder / "more", images=5, seed=7)
    output = folder / "tiny"
    settings = {
        "DATASETS.TEST": datasets["DATASETS.TEST"],
        "DATASETS.UNLABELED": [f"folder:{unlabeled}"],
        "DATASETS.UNLABELED_TRUTH": [f"coco:{ground_truth}:{unlabeled}"],
        "VIS_PERIOD": 2,
        "TEST.EVAL_PERIOD": 2,
    }
    cfg = training_config(datasets, output, settings)
    output.mkdir()
    (output / "config.yaml").write_text(cfg.dump())
    write_run_record(output, ["train_net.py", "--config-file", "tiny.yaml"], processes=1)
    build_trainer(cfg).train()
    test_set = datasets["DATASETS.TEST"][0]
    return TinyRun(output, unlabeled, Path(test_set.rsplit(":", 1)[1]), test_set)


@pytest.fixture
def call(monkeypatch, capsys):
    """Call the main function of a tool; returns its exit code or message, and the output."""

    def call(tool, *arguments):
        monkeypatch.setattr(sys, "argv", [tool.__name__, *map(str, arguments)])
        try:
            tool.main()
        except SystemExit as end:
            return end.code, capsys.readouterr()
        return 0, capsys.readouterr()

    return call
