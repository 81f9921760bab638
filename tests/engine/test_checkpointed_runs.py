"""Whole trainings whose disk is full, whose files are damaged, or that keep few checkpoints."""

import logging
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage, EventWriter

import train_net
from locreweight.engine import evaluation
from locreweight.engine import trainer as trainer_module
from locreweight.engine.hooks import ResumableBestCheckpointer
from locreweight.engine.writers import LenientWriter
from locreweight.errors import UsageError
from tests.checkpoint.test_files import full_disk, truncated_to
from tests.engine.tiny_training import (
    build_trainer,
    copy_of,
    recorded_training,
    restored_loggers_and_signals,
    same,
    training_config,
)
from tests.modeling.tiny_model import tiny_config

CHECKPOINT = 1_000_000  # bytes that no checkpoint fits into, and all else does


class FullIn(HookBase):
    """Fills the disk before some iterations and makes room after them."""

    def __init__(self, iterations):
        self.iterations = iterations
        self.full = full_disk(CHECKPOINT)

    def before_step(self):
        if self.trainer.iter == self.iterations[0]:
            self.full.__enter__()

    def after_step(self):
        if self.trainer.iter == self.iterations[-1]:
            self.full.__exit__(None, None, None)


def checkpoints_in(folder):
    return sorted(file.name for file in folder.glob("*.pth*"))


# --- a full disk ----------------------------------------------------------------------------------


def test_training_goes_on_while_the_disk_is_full(make_trainer, datasets, tmp_path, caplog):
    settings = {"SOLVER.CHECKPOINT_PERIOD": 1}
    undisturbed = recorded_training(
        build_trainer(training_config(datasets, tmp_path / "undisturbed", settings))
    )
    trainer = make_trainer(settings)
    full = FullIn([1, 2])
    trainer.register_hooks([full])
    # Hooks run in order: the disk is full until the checkpoint was tried.
    with caplog.at_level(logging.ERROR):
        record = recorded_training(trainer)
    assert [
        "model_0000001.pth could not be saved" in caplog.text,
        "model_0000002.pth could not be saved" in caplog.text,
        "model_0000003.pth could not be saved" in caplog.text,
    ] == [True, True, False]
    assert checkpoints_in(tmp_path) == ["model_0000000.pth", "model_0000003.pth", "model_final.pth"]
    assert all(same(a, b) for a, b in zip(record.students, undisturbed.students, strict=True))


def test_a_training_that_cannot_keep_its_end_fails_and_can_be_resumed(make_trainer, tmp_path):
    settings = {"SOLVER.CHECKPOINT_PERIOD": 1}
    trainer = make_trainer(settings)
    full = FullIn([2])
    trainer.register_hooks([full])
    full.after_step = lambda: None
    try:
        with pytest.raises(UsageError, match=r"model_final\.pth could not be saved"):
            trainer.train()
    finally:
        full.full.__exit__(None, None, None)
    assert checkpoints_in(tmp_path) == ["model_0000000.pth", "model_0000001.pth"]
    again = make_trainer(settings, resume=True)
    assert again.start_iter == 2
    again.train()
    assert "model_final.pth" in checkpoints_in(tmp_path)


def arguments_of(cfg, folder, *flags):
    (folder / "config.yaml").write_text(cfg.dump())
    return train_net.argument_parser().parse_args(
        ["--config-file", str(folder / "config.yaml"), *flags]
    )


def test_the_exit_code_says_that_the_end_was_not_kept(datasets, tmp_path):
    cfg = training_config(datasets, tmp_path, {"SOLVER.MAX_ITER": 1})
    with restored_loggers_and_signals(), full_disk(CHECKPOINT), pytest.raises(SystemExit) as exit_:
        train_net.launch(train_net.main, arguments_of(cfg, tmp_path))
    assert exit_.value.code.startswith("error: ")
    assert "model_final.pth could not be saved: File too large" in exit_.value.code
    assert "there is no checkpoint yet" in exit_.value.code


def test_a_best_model_that_could_not_be_saved_does_not_count(tmp_path):
    """A later one that is better than what there is takes its place."""
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


def test_metrics_that_cannot_be_written_do_not_end_a_training(caplog):
    class Writer(EventWriter):
        def write(self):
            if next(outcomes):
                raise OSError(28, os.strerror(28))

        def close(self):
            raise OSError(28, os.strerror(28))

    outcomes = iter([True, True, False, True])
    writer = LenientWriter(Writer())
    said = []
    with caplog.at_level(logging.ERROR):
        for _ in range(4):
            writer.write()
            said.append(len(caplog.records))
        writer.close()
    assert said == [1, 1, 1, 2]
    assert "Writer cannot write its metrics: [Errno 28] No space left on device" in caplog.text


def test_every_writer_of_a_training_is_lenient(make_trainer):
    trainer = make_trainer({"SOLVER.MAX_ITER": 1})
    trainer.train()
    (writers,) = [h._writers for h in trainer._hooks if hasattr(h, "_writers")]
    assert len(writers) == 4
    assert all(isinstance(writer, LenientWriter) for writer in writers)


def test_evaluation_during_training_writes_nothing(make_trainer, datasets, tmp_path):
    """What it needs on disk is there before training starts."""

    def files():
        return {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}

    trainer = make_trainer({"DATASETS.TEST": datasets["DATASETS.TEST"]})
    before = files()
    results = trainer._evaluate()
    assert "AP" in results["bbox"] and "AP" in results["student"]["bbox"]
    assert files() == before


def test_a_disk_that_is_full_from_the_start_is_told(datasets, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(evaluation, "convert_to_coco_json", fail)
    # Of its own name, so that no other test has written its ground truth.
    kind, json_file, images = datasets["DATASETS.TEST"][0].split(":")
    (tmp_path / "images").symlink_to(images)
    cfg = training_config(
        datasets, tmp_path, {"DATASETS.TEST": [f"{kind}:{json_file}:{tmp_path}/images"]}
    )
    with pytest.raises(UsageError, match=r"cannot write .*ground_truth_\w+\.json: No space left"):
        build_trainer(cfg)


# --- damaged files --------------------------------------------------------------------------------


@pytest.mark.parametrize("last", ["named", "missing"])
def test_the_command_line_resumes_from_the_file_before_a_damaged_one(datasets, tmp_path, last):
    settings = {"SOLVER.CHECKPOINT_PERIOD": 1, "SOLVER.MAX_ITER": 3}
    cfg = training_config(datasets, tmp_path, settings)
    build_trainer(cfg).train()
    for name in ("model_final.pth", "model_0000002.pth"):
        truncated_to(0.5)(tmp_path / name)
    if last == "missing":
        (tmp_path / "last_checkpoint").unlink()
    with restored_loggers_and_signals():
        train_net.main(arguments_of(cfg, tmp_path, "--resume"))
    log = (tmp_path / "log.txt").read_text()
    assert "resuming from model_0000001.pth" in log
    assert "model_final.pth (" in log and "model_0000002.pth (" in log
    assert "resumed after iteration 1" in log
    assert torch.load(tmp_path / "model_final.pth", weights_only=True)["trainer"]["iteration"] == 2


def test_nothing_of_a_damaged_file_gets_into_the_models(make_trainer, tmp_path):
    make_trainer({"SOLVER.MAX_ITER": 2, "SOLVER.CHECKPOINT_PERIOD": 1}).train()
    expected = torch.load(tmp_path / "model_0000000.pth", weights_only=True)
    for name in ("model_final.pth", "model_0000001.pth"):
        content = torch.load(tmp_path / name, weights_only=True)
        del content["student"]
        torch.save(content, tmp_path / name)
    trainer = make_trainer(resume=True)
    assert trainer.start_iter == 1
    assert same(copy_of(trainer.teacher), expected["model"])
    assert same(copy_of(trainer.student), expected["student"])


def test_a_run_is_not_resumed_with_another_model(make_trainer, tmp_path):
    make_trainer({"SOLVER.MAX_ITER": 1}).train()
    with pytest.raises(UsageError, match="another model than the config") as error:
        make_trainer({"MODEL.ROI_BOX_HEAD.FC_DIM": 24}, resume=True)
    assert str(tmp_path) in str(error.value) and "fc1.weight" in str(error.value)


# --- what is in a file, and how many there are ----------------------------------------------------


def test_scores_of_numpy_do_not_keep_a_checkpoint_from_being_read(
    make_trainer, datasets, tmp_path, monkeypatch
):
    """COCO's evaluation counts in numpy; a file with its numbers could not be read as tensors."""

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


def test_a_run_keeps_as_many_as_configured_also_when_resumed(make_trainer, tmp_path):
    settings = {"SOLVER.CHECKPOINT_PERIOD": 1, "SOLVER.KEEP_CHECKPOINTS": 2}
    make_trainer(settings | {"SOLVER.MAX_ITER": 3}).train()
    assert checkpoints_in(tmp_path) == ["model_0000001.pth", "model_0000002.pth", "model_final.pth"]
    make_trainer(settings | {"SOLVER.MAX_ITER": 5}, resume=True).train()
    assert checkpoints_in(tmp_path) == ["model_0000003.pth", "model_0000004.pth", "model_final.pth"]


def test_by_default_three_are_kept_and_no_file_is_trusted():
    cfg = tiny_config()
    assert cfg.SOLVER.KEEP_CHECKPOINTS == 3
    assert cfg.MODEL.TRUST_WEIGHTS is False
