"""What each of two processes runs in test_agreement.py; importable by both."""

from __future__ import annotations

import argparse
from contextlib import contextmanager
from pathlib import Path

from detectron2.utils import comm

from locreweight.data.training_sets import load_training_sets, register_datasets
from locreweight.engine import agreement
from locreweight.errors import UsageError
from tests.engine.tiny_training import training_config

MANY_KEYS = (
    "SOLVER.CHECKPOINT_PERIOD",
    "SOLVER.KEEP_CHECKPOINTS",
    "SOLVER.MAX_SKIPPED_STEPS",
    "SOLVER.WARMUP_ITERS",
    "VIS_PERIOD",
    "TEST.DETECTIONS_PER_IMAGE",
    "DATALOADER.NUM_WORKERS",
)


class Cases:
    """Errors of the cases of one process; empty if there was none."""

    def __init__(self) -> None:
        self.errors: dict[str, str] = {}

    @contextmanager
    def case(self, name: str):
        self.errors[name] = ""
        try:
            yield
        except UsageError as error:
            self.errors[name] = str(error)


def run(datasets: dict, other_datasets: dict, folder: Path) -> None:
    """Run the checks with processes that agree and that differ, and write the errors to a file."""
    rank = comm.get_rank()
    cases = Cases()
    shared, own = folder / "shared", folder / f"own{rank}"
    shared.mkdir(exist_ok=True)
    own.mkdir()
    agreement._VISIBLE_AFTER_SECONDS = 0.5

    for name, flags, settings in (
        ("same setup", {}, {}),
        ("flag", {"resume": rank == 1}, {}),
        ("config", {}, {"SOLVER.BASE_LR": 0.01 * (rank + 1)}),
        ("many keys", {}, dict.fromkeys(MANY_KEYS, rank + 1)),
    ):
        with cases.case(name):
            args = argparse.Namespace(**{"resume": False, "eval_only": False} | flags)
            agreement.check_same_setup(training_config(datasets, shared, settings), args)

    package, agreement._PACKAGE = agreement._PACKAGE, own / "locreweight"
    agreement._PACKAGE.mkdir()
    (agreement._PACKAGE / "same.py").touch()
    (agreement._PACKAGE / "changed.py").write_text(f"rank = {rank}")
    (agreement._PACKAGE / f"new{rank}.py").touch()
    with cases.case("code"):
        agreement.check_same_setup(training_config(datasets, shared), args)
    agreement._PACKAGE = package

    for name, sets in (
        ("same data", [datasets, datasets]),
        ("other annotations", [datasets, datasets | other_datasets]),
    ):
        with cases.case(name):
            cfg = training_config(sets[rank], shared, {"DATASETS.TEST": datasets["DATASETS.TEST"]})
            register_datasets(cfg)
            agreement.check_same_data(cfg, load_training_sets(cfg))

    for name, output in (("shared folder", shared), ("own folder", own)):
        with cases.case(name):
            agreement.check_shared_folder(output)

    with cases.case("no error"), agreement.raised_everywhere():
        pass
    with cases.case("error of the second process"), agreement.raised_everywhere():
        if rank == 1:
            raise UsageError("data/train.json does not exist")
    with cases.case("error of both processes"), agreement.raised_everywhere():
        raise UsageError(f"own error of process {rank}")

    left = sorted(path.name for path in shared.iterdir())
    (folder / f"errors{rank}.txt").write_text(repr({"errors": cases.errors, "left": left}))
