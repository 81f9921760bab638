"""Resumed runs give the same results as uninterrupted ones, bit for bit."""

import os
import shutil
import signal

import numpy as np
import pytest
import torch
from detectron2.engine import HookBase

from locreweight.checkpoint.loading import read_score_threshold
from locreweight.engine import SemiSupervisedTrainer, preemption, resumable_trainer, writers
from locreweight.engine import trainer as trainer_module
from locreweight.engine.evaluation import evaluate_teacher_and_student
from tests.engine.tiny_training import (
    build_trainer,
    copy_of,
    recorded_training,
    restored_loggers_and_signals,
    same,
    training_config,
)
from tests.modeling.tiny_model import TIMM_BACKBONES
from tests.soak import metrics_of

BURN_IN, MAX_ITER = 3, 8
SETTINGS = {
    "SEMI.BURN_IN_ITERS": BURN_IN,
    "SOLVER.MAX_ITER": MAX_ITER,
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "SOLVER.KEEP_CHECKPOINTS": 0,
    # The learning rate changes in every iteration, and drops in the fifth.
    "SOLVER.WARMUP_ITERS": 4,
    "SOLVER.STEPS": (4,),
    "TEST.EVAL_PERIOD": 4,
}


@pytest.fixture(autouse=True)
def _metrics_every_third_iteration(monkeypatch):
    monkeypatch.setattr(writers, "PERIOD", 3)


@pytest.fixture(scope="module")
def settings(datasets, request):
    backbone = getattr(request, "param", {})
    return SETTINGS | {"DATASETS.TEST": datasets["DATASETS.TEST"]} | backbone


@pytest.fixture(scope="module")
def uninterrupted(datasets, settings, tmp_path_factory):
    """Output folder, record and optimizer state of a run with a checkpoint after each iteration."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writers, "PERIOD", 3)
        trainer = build_trainer(training_config(datasets, folder, settings))
        return folder, recorded_training(trainer), trainer.optimizer.torch_optimizer.state_dict()


@pytest.fixture
def stopped_after(uninterrupted, tmp_path):
    """Prepares the test's folder as if a run had been killed after some iterations."""

    def stop(iterations):
        name = f"model_{iterations - 1:07d}.pth"
        shutil.copy(uninterrupted[0] / name, tmp_path)
        shutil.copy(uninterrupted[0] / "metrics.json", tmp_path)
        (tmp_path / "last_checkpoint").write_text(name)

    return stop


STOPS = pytest.mark.parametrize(
    ("iterations", "workers"),
    [(2, 0), (BURN_IN, 1), (5, 2), (7, 0)],
    ids=["in_burn_in", "at_end_of_burn_in", "after_burn_in", "before_last_iteration"],
)
# Drop path draws random numbers.
WITH_TIMM = TIMM_BACKBONES["timm_efficientnet"] | {
    "MODEL.TIMM.DROP_PATH": 0.3,
    "SOLVER.BACKBONE_LR_FACTOR": 0.5,
}


@pytest.mark.parametrize("settings", [{}, WITH_TIMM], ids=["resnet", "timm"], indirect=True)
@STOPS
def test_resumed_run_equals_uninterrupted_run(
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
        for state in (trainer.optimizer.torch_optimizer.state_dict(), optimizer)
    )
    assert same(momenta, expected)
    assert metrics_of(tmp_path) == metrics_of(folder)
    assert sorted(line["iteration"] for line in metrics_of(folder)) == [2, 3, 5, 7]


def test_random_draws_of_hooks_do_not_change_training(uninterrupted, make_trainer):
    class Draws(HookBase):
        def after_step(self):
            torch.rand(3)
            np.random.rand(3)

    trainer = make_trainer(SETTINGS)
    trainer.register_hooks([Draws()])
    trainer.max_iter = BURN_IN + 2
    assert same(recorded_training(trainer).students[-1], uninterrupted[1].students[BURN_IN + 1])


# --- interrupted by a signal or in an evaluation --------------------------------------------------


class SignalIn(HookBase):
    """Sends this process a signal in an iteration."""

    def __init__(self, iteration):
        self.iteration = iteration

    def before_step(self):
        if self.trainer.iter == self.iteration:
            os.kill(os.getpid(), signal.SIGUSR1)


@pytest.fixture
def stop_request(monkeypatch):
    """Replaces the process's StopRequest by a new one, each time it is called."""

    def renew():
        request = preemption.StopRequest()
        for module in (resumable_trainer, trainer_module):
            monkeypatch.setattr(module, "STOP_REQUEST", request)
        request.listen()

    with restored_loggers_and_signals():
        renew()
        yield renew


def stop_in(iteration, trainer, folder):
    trainer.register_hooks([SignalIn(iteration)])
    with pytest.raises(preemption.Stopped) as stopped:
        trainer.train()
    assert stopped.value.code == 75
    assert (folder / "last_checkpoint").read_text() == "model_resume.pth"


@pytest.mark.parametrize("iteration", [BURN_IN - 1, 3, MAX_ITER - 1])
def test_signal_finishes_the_step_and_loses_nothing(
    uninterrupted, make_trainer, settings, stop_request, tmp_path, iteration
):
    """Metrics are written after iteration 2; there is an evaluation after iterations 3 and 7."""
    settings = settings | {"SOLVER.CHECKPOINT_PERIOD": 3}
    stop_in(iteration, make_trainer(settings), tmp_path)
    stop_request()
    resumed = make_trainer(settings, resume=True)
    assert resumed.start_iter == iteration + 1
    resumed.train()
    assert_same_end(tmp_path, uninterrupted[0])
    # No periodic checkpoint is missing.
    names = {file.name for file in tmp_path.glob("model_00*")}
    assert names == {"model_0000002.pth", "model_0000005.pth"}


class ChangedHooks(SemiSupervisedTrainer):
    """A later version of the trainer: hooks of other classes, in another order, and a new one."""

    def build_hooks(self):
        named = super().build_hooks()
        for hook in named.values():
            hook.__class__ = type(f"New{type(hook).__name__}", (type(hook),), {})
        self.ran_new_hook = []
        new = HookBase()
        new.after_step = lambda: self.ran_new_hook.append(self.iter)
        # Hooks move over the one that saves the checkpoint, in both directions.
        order = ["preemption_checkpoint", "evaluation", "best_model", "early_stopping"]
        order += [
            "iteration_timer",
            "lr_schedule",
            "metrics",
            "final_checkpoint",
            "no_pseudo_label_warning",
        ]
        order += ["periodic_checkpoint"]
        assert set(order) == set(named)
        return {"new": new} | {name: named[name] for name in order}


def test_resume_does_not_depend_on_classes_and_order_of_hooks(
    uninterrupted, make_trainer, settings, stop_request, tmp_path
):
    settings = settings | {"SOLVER.CHECKPOINT_PERIOD": 1000}
    stop_in(3, make_trainer(settings), tmp_path)
    stop_request()
    resumed = make_trainer(settings, resume=True, trainer_class=ChangedHooks)
    resumed.train()
    assert resumed.ran_new_hook == [4, 5, 6, 7]
    assert_same_end(tmp_path, uninterrupted[0])


def assert_same_end(folder, reference):
    assert metrics_of(folder) == metrics_of(reference)
    for name in ("model_final.pth", "model_best.pth"):
        mine, theirs = (torch.load(f / name, weights_only=True) for f in (folder, reference))
        assert same(mine["model"], theirs["model"]), name
        assert same(mine["student"], theirs["student"]), name
        hooks, expected = (x["trainer"]["hooks"] for x in (mine, theirs))
        assert hooks["best_model"] == expected["best_model"]


@pytest.mark.parametrize(
    ("evaluation", "error"), [(1, preemption.Stopped), (2, RuntimeError)], ids=["middle", "last"]
)
def test_interrupted_evaluation_is_repeated(
    uninterrupted, make_trainer, settings, monkeypatch, tmp_path, evaluation, error
):
    """After the last evaluation there is nothing left to train."""
    count = 0

    def interrupted(*arguments, **keywords):
        nonlocal count
        count += 1
        if count == evaluation:
            raise error
        return evaluate_teacher_and_student(*arguments, **keywords)

    settings = settings | {"SOLVER.CHECKPOINT_PERIOD": 1000}
    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(trainer_module, "evaluate_teacher_and_student", interrupted)
        make_trainer(settings).train()
    resumed = make_trainer(settings, resume=True)
    assert resumed.start_iter == 4 * evaluation
    assert not resumed.is_finished
    assert "bbox/AP" in resumed.train()
    assert_same_end(tmp_path, uninterrupted[0])
    finished = make_trainer(settings, resume=True)
    assert finished.is_finished and finished.train() == {}


@pytest.mark.parametrize("resume", [True, False])
def test_metrics_of_a_run_without_checkpoints(uninterrupted, make_trainer, tmp_path, resume):
    """They are removed with --resume, and kept without."""
    shutil.copy(uninterrupted[0] / "metrics.json", tmp_path)
    earlier = metrics_of(tmp_path)
    trainer = make_trainer(SETTINGS, resume=resume)
    trainer.max_iter = BURN_IN
    trainer.train()
    assert metrics_of(tmp_path) == ([] if resume else earlier) + earlier[:1]


# --- start of a resumed run -----------------------------------------------------------------------


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
        s["momentum_buffer"]
        for s in trainer.optimizer.torch_optimizer.state_dict()["state"].values()
    ]
    assert momenta and all(m.any() for m in momenta[:1])


def test_without_resume_checkpoints_are_ignored(stopped_after, make_trainer, settings):
    stopped_after(5)
    trainer = make_trainer(settings)
    assert trainer.start_iter == 0
    assert same(copy_of(trainer.student), copy_of(trainer.teacher))


def test_resume_without_checkpoints_starts_from_the_beginning(make_trainer, settings):
    trainer = make_trainer(settings, resume=True)
    assert trainer.start_iter == 0


def test_run_killed_before_its_final_checkpoint_saves_it(
    uninterrupted, stopped_after, make_trainer, settings, tmp_path
):
    """Between the periodic checkpoint of the last iteration and the final one."""
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


def test_finished_run_does_nothing(uninterrupted, make_trainer, settings, tmp_path):
    shutil.copy(uninterrupted[0] / "model_final.pth", tmp_path)
    trainer = make_trainer(settings, resume=True)
    before = copy_of(trainer.student)
    assert trainer.train() == {}
    assert same(copy_of(trainer.student), before)


def test_loss_scale_of_float16_is_restored(make_trainer):
    settings = {
        "SOLVER.MAX_ITER": 1,
        "SOLVER.AMP.ENABLED": True,
        "SOLVER.AMP.DTYPE": "float16",
    }
    trainer = make_trainer(settings)
    trainer.optimizer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=32.0)
    trainer.train()
    assert make_trainer(settings, resume=True).optimizer.grad_scaler.get_scale() == 32.0


# --- best model -----------------------------------------------------------------------------------


@pytest.fixture
def scripted(datasets, make_trainer, monkeypatch):
    """Trains with given results of the evaluation after each iteration."""

    def train(results, resume=False, **settings):
        remaining = iter(results)

        def evaluate_teacher_and_student(*_, **__):
            precision = next(remaining)
            result = {"bbox": {"AP": precision, "F1-threshold": precision / 100}}
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


def test_best_teacher_is_saved(scripted, tmp_path):
    _, record = scripted([10.0, 30.0, 20.0], **{"SOLVER.MAX_ITER": 3})
    assert same(best_model(tmp_path), record.teachers[1])


def test_checkpoints_have_the_score_threshold_of_their_teacher(scripted, tmp_path):
    settings = {"SOLVER.MAX_ITER": 4, "TEST.EVAL_PERIOD": 2, "SOLVER.CHECKPOINT_PERIOD": 1}
    scripted([50.0, 20.0], **settings)
    expected = {
        "model_0000000": None,  # not evaluated
        "model_0000001": 0.5,
        "model_0000002": None,
        "model_best": 0.5,
        "model_final": 0.2,
    }
    for name, threshold in expected.items():
        assert read_score_threshold(str(tmp_path / f"{name}.pth")) == threshold


def test_score_threshold_survives_a_resume(scripted, tmp_path):
    scripted([50.0, 20.0], **{"SOLVER.MAX_ITER": 2})
    (tmp_path / "model_final.pth").unlink()
    (tmp_path / "last_checkpoint").write_text("model_best.pth")  # saved after the first evaluation
    scripted([30.0], resume=True, **{"SOLVER.MAX_ITER": 2})
    assert read_score_threshold(str(tmp_path / "model_best.pth")) == 0.5
    assert read_score_threshold(str(tmp_path / "model_final.pth")) == 0.3


def test_resumed_run_keeps_the_best_result(scripted, tmp_path):
    """Results that are worse, NaN or equal do not replace it."""
    _, record = scripted([10.0, 30.0], **{"SOLVER.MAX_ITER": 2})
    scripted([20.0, float("nan"), 30.0], resume=True, **{"SOLVER.MAX_ITER": 5})
    assert same(best_model(tmp_path), record.teachers[1])


@pytest.mark.parametrize("results", [[10.0, 30.0], [30.0, 10.0]])
def test_finished_run_can_be_extended(scripted, tmp_path, results):
    """No iteration is missing, whether the last evaluation was the best or not."""
    scripted(results, **{"SOLVER.MAX_ITER": 2})
    trainer, record = scripted([20.0, 40.0], resume=True, **{"SOLVER.MAX_ITER": 4})
    assert trainer.start_iter == 2
    assert len(record.images) == 2
    assert same(best_model(tmp_path), record.teachers[-1])
