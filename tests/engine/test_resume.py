"""A run that was interrupted goes on as if it had not been."""

import os
import shutil
import signal

import numpy as np
import pytest
import torch
from detectron2.engine import HookBase

from locreweight.engine import preemption
from locreweight.engine import resumable_trainer as resumable
from locreweight.engine import trainer as trainer_module
from locreweight.engine import writers as metrics
from locreweight.engine.evaluation import evaluate_teacher_and_student
from tests.engine.tiny_training import (
    build_trainer,
    copy_of,
    logging_of_its_own,
    recorded_training,
    same,
    training_config,
)
from tests.soak import metrics_of

BURN_IN, MAX_ITER = 3, 8
SETTINGS = {
    "SEMI.BURN_IN_ITERS": BURN_IN,
    "SOLVER.MAX_ITER": MAX_ITER,
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "SOLVER.KEEP_CHECKPOINTS": 0,
    # The rate changes in every iteration, and jumps in the fifth.
    "SOLVER.WARMUP_ITERS": 4,
    "SOLVER.STEPS": (4,),
    "TEST.EVAL_PERIOD": 4,
}


@pytest.fixture(autouse=True)
def _a_line_of_metrics_every_third_iteration(monkeypatch):
    monkeypatch.setattr(metrics, "PERIOD", 3)


@pytest.fixture(scope="module")
def settings(datasets):
    return SETTINGS | {"DATASETS.TEST": datasets["DATASETS.TEST"]}


@pytest.fixture(scope="module")
def uninterrupted(datasets, settings, tmp_path_factory):
    """The output folder of a whole run, with a checkpoint after each iteration; its record."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "PERIOD", 3)
        trainer = build_trainer(training_config(datasets, folder, settings))
        return folder, recorded_training(trainer), trainer.optimizer.optimizer.state_dict()


@pytest.fixture
def stopped_after(uninterrupted, tmp_path):
    """Leaves an output folder as it was after so many iterations, or some time later."""

    def stop(iterations):
        name = f"model_{iterations - 1:07d}.pth"
        shutil.copy(uninterrupted[0] / name, tmp_path)
        shutil.copy(uninterrupted[0] / "metrics.json", tmp_path)
        (tmp_path / "last_checkpoint").write_text(name)

    return stop


STOPS = pytest.mark.parametrize(
    ("iterations", "workers"),
    [(2, 0), (BURN_IN, 1), (5, 2), (7, 0)],
    ids=["in burn-in", "at its end", "after it", "before the last iteration"],
)


@STOPS
def test_a_resumed_run_ends_as_the_uninterrupted_one(
    uninterrupted, stopped_after, make_trainer, settings, iterations, workers, tmp_path
):
    """With any number of loader workers."""
    folder, whole, optimizer = uninterrupted
    stopped_after(iterations)
    trainer = make_trainer(settings | {"DATALOADER.NUM_WORKERS": workers}, resume=True)
    assert trainer.start_iter == iterations
    record = recorded_training(trainer)
    assert trainer.iter == MAX_ITER
    assert record.images == whole.images[iterations:]
    assert record.rates == whole.rates[iterations:]
    assert len(set(whole.rates)) > 3
    for mine, reference in (
        (record.students, whole.students),
        (record.teachers, whole.teachers),
    ):
        assert len(mine) == MAX_ITER - iterations
        assert all(same(a, b) for a, b in zip(mine, reference[iterations:], strict=True))
    momenta, expected = (
        {n: s["momentum_buffer"] for n, s in state["state"].items()}
        for state in (trainer.optimizer.optimizer.state_dict(), optimizer)
    )
    assert same(momenta, expected)
    assert metrics_of(tmp_path) == metrics_of(folder)
    assert sorted(line["iteration"] for line in metrics_of(folder)) == [2, 3, 5, 7]


def test_a_hook_that_draws_numbers_changes_nothing(uninterrupted, make_trainer, settings, tmp_path):
    class Draws(HookBase):
        def after_step(self):
            torch.rand(3)
            np.random.rand(3)

    trainer = make_trainer(settings)
    trainer.register_hooks([Draws()])
    assert same(recorded_training(trainer).students[-1], uninterrupted[1].students[-1])


# --- stopped by a signal, or in an evaluation -----------------------------------------------------


class SignalIn(HookBase):
    """Sends this process a signal in the middle of an iteration."""

    def __init__(self, iteration):
        self.iteration = iteration

    def before_step(self):
        if self.trainer.iter == self.iteration:
            os.kill(os.getpid(), signal.SIGUSR1)


@pytest.fixture
def stop_request(monkeypatch):
    """A new one, which listens."""
    request = preemption.StopRequest()
    for module in (resumable, trainer_module):
        monkeypatch.setattr(module, "STOP_REQUEST", request)
    with logging_of_its_own():
        request.listen()
        yield request


@pytest.mark.parametrize("at", [BURN_IN - 1, 3, 5, MAX_ITER - 1])
def test_a_signal_lets_the_step_end_and_loses_nothing(
    uninterrupted, make_trainer, settings, stop_request, monkeypatch, tmp_path, at
):
    """Also in iterations that are followed by an evaluation (3, 7) or a line of metrics (2, 5)."""
    settings = settings | {"SOLVER.CHECKPOINT_PERIOD": 3}
    trainer = make_trainer(settings)
    trainer.register_hooks([SignalIn(at)])
    with pytest.raises(preemption.Stopped) as stopped:
        trainer.train()
    assert stopped.value.code == 75
    assert (tmp_path / "last_checkpoint").read_text() == "model_resume.pth"
    for module in (resumable, trainer_module):
        monkeypatch.setattr(module, "STOP_REQUEST", preemption.StopRequest())
    resumed = make_trainer(settings, resume=True)
    assert resumed.start_iter == at + 1
    resumed.train()
    assert_ends_alike(tmp_path, uninterrupted[0])
    # A file is missing neither of those that are written every third iteration.
    names = {file.name for file in tmp_path.glob("model_00*")}
    assert names == {"model_0000002.pth", "model_0000005.pth"}


def assert_ends_alike(folder, reference):
    assert metrics_of(folder) == metrics_of(reference)
    for name in ("model_final.pth", "model_best.pth"):
        mine, theirs = (torch.load(f / name, weights_only=True) for f in (folder, reference))
        assert same(mine["model"], theirs["model"]), name
        assert same(mine["student"], theirs["student"]), name
        hooks, expected = (x["trainer"]["hooks"] for x in (mine, theirs))
        assert hooks["ResumableBestCheckpointer"] == expected["ResumableBestCheckpointer"]


@pytest.mark.parametrize("evaluation", [1, 2])
@pytest.mark.parametrize("how", [preemption.Stopped, RuntimeError])
def test_an_evaluation_that_was_stopped_is_done_after_all(
    uninterrupted, make_trainer, settings, monkeypatch, tmp_path, evaluation, how
):
    """The one on the way, and the last one, after which there is nothing left to train."""
    count = 0

    def stopped(*arguments, **keywords):
        nonlocal count
        count += 1
        if count == evaluation:
            raise how
        return evaluate_teacher_and_student(*arguments, **keywords)

    settings = settings | {"SOLVER.CHECKPOINT_PERIOD": 1000}
    with monkeypatch.context() as patch, pytest.raises(how):
        patch.setattr(trainer_module, "evaluate_teacher_and_student", stopped)
        make_trainer(settings).train()
    resumed = make_trainer(settings, resume=True)
    assert resumed.start_iter == 4 * evaluation
    assert not resumed.is_finished
    assert "bbox/AP" in resumed.train()
    assert_ends_alike(tmp_path, uninterrupted[0])
    finished = make_trainer(settings, resume=True)
    assert finished.is_finished and finished.train() == {}


def test_metrics_of_a_run_that_left_no_checkpoint_are_taken_back(
    uninterrupted, make_trainer, settings, tmp_path
):
    shutil.copy(uninterrupted[0] / "metrics.json", tmp_path)
    make_trainer(settings, resume=True).train()
    assert metrics_of(tmp_path) == metrics_of(uninterrupted[0])


def test_without_resume_earlier_metrics_stay(uninterrupted, make_trainer, settings, tmp_path):
    shutil.copy(uninterrupted[0] / "metrics.json", tmp_path)
    make_trainer(settings).train()
    assert metrics_of(tmp_path) == 2 * metrics_of(uninterrupted[0])


# --- what a resumed run begins with ---------------------------------------------------------------


def test_resuming_restores_both_models_and_the_optimizer(
    uninterrupted, stopped_after, make_trainer, settings
):
    _, whole, _ = uninterrupted
    stopped_after(5)
    trainer = make_trainer(settings, resume=True)
    assert same(copy_of(trainer.student), whole.students[4])
    assert same(copy_of(trainer.teacher), whole.teachers[4])
    assert not same(whole.students[4], whole.teachers[4])
    momenta = [
        s["momentum_buffer"] for s in trainer.optimizer.optimizer.state_dict()["state"].values()
    ]
    assert momenta and all(m.any() for m in momenta[:1])


def test_burn_in_is_not_done_again(stopped_after, make_trainer, settings):
    stopped_after(5)
    trainer = make_trainer(settings, resume=True)
    assert [len(images) for images in recorded_training(trainer).images] == [2 + 2] * 3
    assert not same(copy_of(trainer.student), copy_of(trainer.teacher))


def test_without_resume_a_run_starts_anew(stopped_after, make_trainer, settings):
    stopped_after(5)
    trainer = make_trainer(settings)
    assert trainer.start_iter == 0
    assert same(copy_of(trainer.student), copy_of(trainer.teacher))


def test_resume_without_a_checkpoint_starts_from_the_beginning(make_trainer, settings):
    trainer = make_trainer(settings, resume=True)
    assert trainer.start_iter == 0


def test_a_run_that_ended_before_its_last_file_makes_up_for_it(
    uninterrupted, stopped_after, make_trainer, settings, tmp_path
):
    """Killed, or out of disk, between the periodic checkpoint of the last iteration and it."""
    stopped_after(MAX_ITER)
    trainer = make_trainer(settings, resume=True)
    assert not trainer.is_finished
    trainer.train()
    mine, theirs = (
        torch.load(f / "model_final.pth", weights_only=True) for f in (tmp_path, uninterrupted[0])
    )
    assert same(mine["model"], theirs["model"]) and same(mine["student"], theirs["student"])
    assert mine["iteration"] == theirs["iteration"] == MAX_ITER - 1
    assert metrics_of(tmp_path) == metrics_of(uninterrupted[0])
    assert make_trainer(settings, resume=True).is_finished


def test_a_finished_run_has_nothing_left_to_do(uninterrupted, make_trainer, settings, tmp_path):
    shutil.copy(uninterrupted[0] / "model_final.pth", tmp_path)
    trainer = make_trainer(settings, resume=True)
    before = copy_of(trainer.student)
    assert trainer.train() == {}
    assert same(copy_of(trainer.student), before)


def test_a_training_that_is_stopped_by_an_exception_can_be_resumed(
    uninterrupted, make_trainer, settings
):
    class Stop(HookBase):
        def after_step(self):
            if self.trainer.iter == 3:
                raise KeyboardInterrupt

    trainer = make_trainer(settings)
    trainer.register_hooks([Stop()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    resumed = make_trainer(settings, resume=True)
    assert resumed.start_iter == 4
    assert recorded_training(resumed).images == uninterrupted[1].images[4:]


def test_the_loss_scale_of_float16_is_restored(make_trainer):
    settings = {
        "SOLVER.MAX_ITER": 1,
        "SOLVER.AMP.ENABLED": True,
        "SOLVER.AMP.DTYPE": "float16",
    }
    trainer = make_trainer(settings)
    trainer.optimizer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=32.0)
    trainer.train()
    assert make_trainer(settings, resume=True).optimizer.grad_scaler.get_scale() == 32.0


# --- the best result ------------------------------------------------------------------------------


@pytest.fixture
def scripted(datasets, make_trainer, monkeypatch):
    """Trains with an evaluation after each iteration, whose results are given."""

    def train(results, resume=False, **settings):
        remaining = iter(results)

        def evaluate_teacher_and_student(*_, **__):
            result = {"bbox": {"AP": next(remaining)}}
            return {**result, "student": result}

        monkeypatch.setattr(
            trainer_module, "evaluate_teacher_and_student", evaluate_teacher_and_student
        )
        trainer = make_trainer(
            {
                "DATASETS.TEST": datasets["DATASETS.TEST"],
                "DATASETS.UNLABELED": (),
                "SEMI.BURN_IN_ITERS": 10,
                "TEST.EVAL_PERIOD": 1,
                **settings,
            },
            resume=resume,
        )
        record = recorded_training(trainer)
        assert not list(remaining)
        return trainer, record

    return train


def best_model(folder):
    return torch.load(folder / "model_best.pth", weights_only=True)["model"]


def test_the_best_teacher_is_kept(scripted, tmp_path):
    _, record = scripted([10.0, 30.0, 20.0], **{"SOLVER.MAX_ITER": 3})
    assert same(best_model(tmp_path), record.teachers[1])


@pytest.mark.parametrize("later", [[20.0], [float("nan")], [30.0]])
def test_a_resumed_run_remembers_the_best_result(scripted, tmp_path, later):
    _, record = scripted([10.0, 30.0], **{"SOLVER.MAX_ITER": 2})
    scripted(later, resume=True, **{"SOLVER.MAX_ITER": 3})
    assert same(best_model(tmp_path), record.teachers[1])


def test_a_resumed_run_can_become_better(scripted, tmp_path):
    scripted([10.0, 30.0], **{"SOLVER.MAX_ITER": 2})
    _, record = scripted([20.0, 40.0], resume=True, **{"SOLVER.MAX_ITER": 4})
    assert same(best_model(tmp_path), record.teachers[-1])


@pytest.mark.parametrize("results", [[10.0, 30.0], [30.0, 10.0]])
def test_a_finished_run_can_be_prolonged(scripted, results):
    """Not an iteration is left out, whether the last evaluation was the best or not."""
    scripted(results, **{"SOLVER.MAX_ITER": 2})
    trainer, record = scripted([5.0, 5.0], resume=True, **{"SOLVER.MAX_ITER": 4})
    assert trainer.start_iter == 2
    assert len(record.images) == 2
