"""One tiny run that all tools are tried on."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from locreweight.engine.run_record import write_run_record
from tests.engine.tiny_training import build_trainer, make_datasets, training_config
from tests.tiny_data import make_coco


@dataclass(frozen=True)
class TinyRun:
    output: Path
    unlabeled: Path  # folder of its five unlabeled images
    test_images: Path  # folder of its three test images
    test_set: str


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A finished training with panels, measured pseudo-labels, evaluations and checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    datasets = make_datasets(folder)
    truth, unlabeled = make_coco(folder / "more", images=5, seed=7)
    output = folder / "tiny"
    settings = {
        "DATASETS.TEST": datasets["DATASETS.TEST"],
        "DATASETS.UNLABELED": [f"folder:{unlabeled}"],
        "DATASETS.UNLABELED_TRUTH": [f"coco:{truth}:{unlabeled}"],
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
