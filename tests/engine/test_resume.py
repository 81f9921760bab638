"""A run that was interrupted goes on as if it had not been."""

import shutil

import pytest
import torch
from detectron2.engine import HookBase

from locreweight.engine import trainer as trainer_module
from tests.engine.tiny_training import (
    build_trainer,
    copy_of,
    recorded_training,
    same,
    training_config,
)

BURN_IN, MAX_ITER = 3, 6
SETTINGS = {
    "SEMI.BURN_IN_ITERS": BURN_IN,
    "SOLVER.MAX_ITER": MAX_ITER,
    "SOLVER.CHECKPOINT_PERIOD": 1,
    # The rate changes in every iteration, and jumps in the fifth.
    "SOLVER.WARMUP_ITERS": 4,
    "SOLVER.STEPS": (4,),
}


@pytest.fixture(scope="module")
def uninterrupted(datasets, tmp_path_factory):
    """The output folder of a whole run, with a checkpoint after each iteration; its record."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    trainer = build_trainer(training_config(datasets, folder, SETTINGS))
    record = recorded_training(trainer)
    return folder, record, trainer.optimizer.state_dict()


@pytest.fixture
def stopped_after(uninterrupted, tmp_path):
    """Leaves an output folder as it was after so many iterations."""

    def stop(iterations):
        name = f"model_{iterations - 1:07d}.pth"
        shutil.copy(uninterrupted[0] / name, tmp_path)
        (tmp_path / "last_checkpoint").write_text(name)

    return stop


STOPS = pytest.mark.parametrize(
    "iterations", [2, BURN_IN, 5], ids=["in burn-in", "at its end", "after it"]
)


@STOPS
def test_a_resumed_run_ends_as_the_uninterrupted_one(
    uninterrupted, stopped_after, make_trainer, iterations
):
    _, whole, optimizer = uninterrupted
    stopped_after(iterations)
    trainer = make_trainer(SETTINGS, resume=True)
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
        for state in (trainer.optimizer.state_dict(), optimizer)
    )
    assert same(momenta, expected)


def test_resuming_restores_both_models_and_the_optimizer(
    uninterrupted, stopped_after, make_trainer
):
    _, whole, _ = uninterrupted
    stopped_after(5)
    trainer = make_trainer(SETTINGS, resume=True)
    assert same(copy_of(trainer.student), whole.students[4])
    assert same(copy_of(trainer.teacher), whole.teachers[4])
    assert not same(whole.students[4], whole.teachers[4])
    momenta = [s["momentum_buffer"] for s in trainer.optimizer.state_dict()["state"].values()]
    assert momenta and all(m.any() for m in momenta[:1])


def test_burn_in_is_not_done_again(stopped_after, make_trainer):
    stopped_after(5)
    trainer = make_trainer(SETTINGS, resume=True)
    (images,) = recorded_training(trainer).images
    assert len(images) == 2 + 2
    assert not same(copy_of(trainer.student), copy_of(trainer.teacher))


def test_without_resume_a_run_starts_anew(stopped_after, make_trainer):
    stopped_after(5)
    trainer = make_trainer(SETTINGS)
    assert trainer.start_iter == 0
    assert same(copy_of(trainer.student), copy_of(trainer.teacher))


def test_resume_without_a_checkpoint_starts_from_the_beginning(make_trainer):
    trainer = make_trainer(SETTINGS, resume=True)
    assert trainer.start_iter == 0


def test_a_finished_run_has_nothing_left_to_do(stopped_after, make_trainer):
    stopped_after(6)
    trainer = make_trainer(SETTINGS, resume=True)
    before = copy_of(trainer.student)
    assert trainer.train() == {}
    assert same(copy_of(trainer.student), before)


def test_a_training_that_is_stopped_by_an_exception_can_be_resumed(uninterrupted, make_trainer):
    class Stop(HookBase):
        def after_step(self):
            if self.trainer.iter == 3:
                raise KeyboardInterrupt

    trainer = make_trainer(SETTINGS)
    trainer.register_hooks([Stop()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    resumed = make_trainer(SETTINGS, resume=True)
    assert resumed.start_iter == 4
    assert recorded_training(resumed).images == uninterrupted[1].images[4:]


def test_the_loss_scale_of_float16_is_restored(make_trainer):
    settings = {
        "SOLVER.MAX_ITER": 1,
        "SOLVER.AMP.ENABLED": True,
        "SOLVER.AMP.DTYPE": "float16",
    }
    trainer = make_trainer(settings)
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=32.0)
    trainer.train()
    assert make_trainer(settings, resume=True).grad_scaler.get_scale() == 32.0


# --- the best result ------------------------------------------------------------------------------


@pytest.fixture
def scripted(datasets, make_trainer, monkeypatch):
    """Trains with an evaluation after each iteration, whose results are given."""

    def train(results, resume=False, **settings):
        remaining = iter(results)

        def evaluate_both(*_, **__):
            result = {"bbox": {"AP": next(remaining)}}
            return {**result, "student": result}

        monkeypatch.setattr(trainer_module, "evaluate_both", evaluate_both)
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
