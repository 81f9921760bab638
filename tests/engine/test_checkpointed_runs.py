"""Trainings with a full disk, with damaged checkpoints, and with few checkpoints to keep."""

import logging
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage

import train_net
from locreweight.engine import trainer as trainer_module
from locreweight.engine.hooks import ResumableBestCheckpointer
from locreweight.engine.writers import LenientWriter
from locreweight.errors import UsageError
from tests.checkpoint.test_files import full_disk, truncate_to
from tests.engine.tiny_training import (
    build_trainer,
    copy_of,
    recorded_training,
    restored_loggers_and_signals,
    same,
    training_config,
)
from tests.modeling.tiny_model import tiny_config

FREE = 1_000_000  # bytes: less than a checkpoint, and more than all other files


class FullIn(HookBase):
    """Fills the disk before the first of some iterations, and empties it after the last."""

    def __init__(self, iterations):
        self.iterations = iterations
        self.full = full_disk(FREE)

    def before_step(self):
        if self.trainer.iter == self.iterations[0]:
            self.full.__enter__()

    def after_step(self):
        if self.trainer.iter == self.iterations[-1]:
            self.full.__exit__(None, None, None)


EACH_ITERATION = {"SOLVER.CHECKPOINT_PERIOD": 1}


def checkpoints_in(folder):
    return sorted(file.name for file in folder.glob("*.pth*"))


# --- a full disk ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(datasets, tmp_path_factory):
    """Output folder and record of a training with a checkpoint after each of its 4 iterations."""
    folder = tmp_path_factory.mktemp("undisturbed")
    cfg = training_config(datasets, folder, EACH_ITERATION)
    return folder, recorded_training(build_trainer(cfg))


def test_training_continues_while_the_disk_is_full(undisturbed, make_trainer, tmp_path, caplog):
    trainer = make_trainer(EACH_ITERATION)
    # Registered after the checkpoint hooks: the disk is full until they have run.
    trainer.register_hooks([FullIn([1, 2])])
    with caplog.at_level(logging.ERROR):
        record = recorded_training(trainer)
    for i, failed in {1: True, 2: True, 3: False}.items():
        assert (f"model_000000{i}.pth could not be saved" in caplog.text) == failed
    assert checkpoints_in(tmp_path) == ["model_0000000.pth", "model_0000003.pth", "model_final.pth"]
    assert all(same(a, b) for a, b in zip(record.students, undisturbed[1].students, strict=True))


def test_training_whose_final_checkpoint_cannot_be_saved_can_be_resumed(make_trainer, tmp_path):
    trainer = make_trainer(EACH_ITERATION)
    full = FullIn([2])
    trainer.register_hooks([full])
    full.after_step = lambda: None
    try:
        with pytest.raises(UsageError, match=r"model_final\.pth could not be saved"):
            trainer.train()
    finally:
        full.full.__exit__(None, None, None)
    assert checkpoints_in(tmp_path) == ["model_0000000.pth", "model_0000001.pth"]
    resumed = make_trainer(EACH_ITERATION, resume=True)
    assert resumed.start_iter == 2
    resumed.train()
    assert "model_final.pth" in checkpoints_in(tmp_path)


def arguments_of(cfg, folder, *flags):
    (folder / "config.yaml").write_text(cfg.dump())
    return train_net.argument_parser().parse_args(
        ["--config-file", str(folder / "config.yaml"), *flags]
    )


def test_command_line_exits_with_an_error_if_the_final_checkpoint_cannot_be_saved(
    datasets, tmp_path
):
    cfg = training_config(datasets, tmp_path, {"SOLVER.MAX_ITER": 1})
    with restored_loggers_and_signals(), full_disk(FREE), pytest.raises(SystemExit) as exit_:
        train_net.launch(train_net.main, arguments_of(cfg, tmp_path))
    assert exit_.value.code.startswith("error: ")
    assert "model_final.pth could not be saved: File too large" in exit_.value.code
    assert "there is no checkpoint yet" in exit_.value.code


def test_best_model_that_cannot_be_saved_does_not_count():
    """A later model replaces the saved one if it is better than that."""
    saved = []
    outcomes = iter([True, False, True])
    checkpointer = SimpleNamespace(save=lambda name: saved.append(name) or next(outcomes))
    hook = ResumableBestCheckpointer(1, checkpointer, "bbox/AP")
    best = []
    with EventStorage() as storage:
        hook.trainer = SimpleNamespace(storage=storage, iter=0, max_iter=10)
        for iteration, result in enumerate([10.0, 30.0, 20.0, 15.0]):
            hook.trainer.iter = storage.iter = iteration
            storage.put_scalar("bbox/AP", result)
            hook.after_step()
            best.append(hook.best_metric)
    assert best == [10.0, 10.0, 20.0, 20.0]
    assert len(saved) == 3


def test_all_writers_of_a_training_are_lenient(make_trainer):
    trainer = make_trainer({"SOLVER.MAX_ITER": 1})
    trainer.train()
    (writers,) = [h._writers for h in trainer._hooks if hasattr(h, "_writers")]
    assert len(writers) == 4
    assert all(isinstance(writer, LenientWriter) for writer in writers)


def test_evaluation_during_training_writes_only_its_analysis(make_trainer, datasets, tmp_path):
    """The other files that it needs are written before training starts."""

    def files():
        return {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}

    trainer = make_trainer({"DATASETS.TEST": datasets["DATASETS.TEST"]})
    before = files()
    results = trainer._evaluate()
    assert "AP" in results["bbox"] and "AP" in results["student"]["bbox"]
    after = files()
    assert {file.name for file in after.keys() - before.keys()} <= {"analysis", "iter_0000001.json"}
    assert before.items() <= after.items()


def test_disk_that_is_full_from_the_start_is_an_error(datasets, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "write_text", fail)
    # A new path, so that no other test has written its ground truth.
    kind, json_file, images = datasets["DATASETS.TEST"][0].split(":")
    (tmp_path / "images").symlink_to(images)
    cfg = training_config(
        datasets, tmp_path, {"DATASETS.TEST": [f"{kind}:{json_file}:{tmp_path}/images"]}
    )
    with pytest.raises(UsageError, match=r"cannot write .*ground_truth_\w+\.json: No space left"):
        build_trainer(cfg)


# --- damaged files --------------------------------------------------------------------------------


@pytest.fixture
def copied_run(undisturbed, tmp_path):
    """The test's output folder with the checkpoints of a run."""
    for file in (*undisturbed[0].glob("*.pth"), undisturbed[0] / "last_checkpoint"):
        shutil.copy(file, tmp_path)
    return tmp_path


def test_command_line_resumes_from_the_checkpoint_before_a_damaged_one(copied_run, datasets):
    for name in ("model_final.pth", "model_0000003.pth", "model_0000002.pth"):
        truncate_to(0.5)(copied_run / name)
    cfg = training_config(datasets, copied_run, EACH_ITERATION | {"SOLVER.MAX_ITER": 3})
    with restored_loggers_and_signals():
        train_net.main(arguments_of(cfg, copied_run, "--resume"))
    log = (copied_run / "log.txt").read_text()
    assert "resuming from model_0000001.pth" in log
    assert "model_final.pth (" in log and "model_0000002.pth (" in log
    assert "resumed after iteration 2" in log
    assert (
        torch.load(copied_run / "model_final.pth", weights_only=True)["trainer"]["iteration"] == 2
    )


def test_nothing_of_a_damaged_checkpoint_is_loaded(copied_run, make_trainer):
    expected = torch.load(copied_run / "model_0000002.pth", weights_only=True)
    for name in ("model_final.pth", "model_0000003.pth"):
        content = torch.load(copied_run / name, weights_only=True)
        del content["student"]
        torch.save(content, copied_run / name)
    trainer = make_trainer(resume=True)
    assert trainer.start_iter == 3
    assert same(copy_of(trainer.teacher), expected["model"])
    assert same(copy_of(trainer.student), expected["student"])


def test_run_is_not_resumed_with_another_model(copied_run, make_trainer):
    with pytest.raises(UsageError, match="another model than the config") as error:
        make_trainer({"MODEL.ROI_BOX_HEAD.FC_DIM": 24}, resume=True)
    assert str(copied_run) in str(error.value) and "fc1.weight" in str(error.value)


# --- content and number of checkpoints ------------------------------------------------------------


def test_checkpoint_with_numpy_results_can_be_read(make_trainer, datasets, tmp_path, monkeypatch):
    """COCO's evaluation returns NumPy numbers, which are not loaded with weights_only."""

    def evaluate_teacher_and_student(*_, **__):
        return {"bbox": {"AP": np.float64(12.5)}, "student": {"bbox": {"AP": np.float32(10)}}}

    monkeypatch.setattr(
        trainer_module, "evaluate_teacher_and_student", evaluate_teacher_and_student
    )
    settings = {"DATASETS.TEST": datasets["DATASETS.TEST"], "TEST.EVAL_PERIOD": 1}
    make_trainer(settings | {"SOLVER.MAX_ITER": 2}).train()
    content = torch.load(tmp_path / "model_best.pth", weights_only=True)
    hooks = content["trainer"]["hooks"]
    assert hooks["best_model"]["best_metric"] == 12.5


def test_number_of_checkpoints_also_holds_after_a_resume(make_trainer, tmp_path):
    settings = {"SOLVER.CHECKPOINT_PERIOD": 1, "SOLVER.KEEP_CHECKPOINTS": 2}
    make_trainer(settings | {"SOLVER.MAX_ITER": 3}).train()
    assert checkpoints_in(tmp_path) == ["model_0000001.pth", "model_0000002.pth", "model_final.pth"]
    make_trainer(settings | {"SOLVER.MAX_ITER": 5}, resume=True).train()
    assert checkpoints_in(tmp_path) == ["model_0000003.pth", "model_0000004.pth", "model_final.pth"]


def test_defaults_keep_three_checkpoints_and_trust_no_file():
    cfg = tiny_config()
    assert cfg.SOLVER.KEEP_CHECKPOINTS == 3
    assert cfg.MODEL.TRUST_WEIGHTS is False
