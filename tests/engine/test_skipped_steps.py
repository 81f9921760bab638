"""Losses and gradients that are not finite: such a step is left out, and training goes on."""

import json
import math

import pytest
import torch
from detectron2.engine import HookBase

from locreweight.engine import trainer as trainer_module
from locreweight.engine import writers as metrics
from locreweight.engine.optimizer import largest_in_gradients
from locreweight.engine.step_metrics import StepReport, describe_problems
from locreweight.engine.training_step import training_step
from locreweight.errors import UsageError
from tests.engine.tiny_training import copy_of, same

FAILURE = "Predicted boxes or scores contain Inf/NaN"


def loss_becomes(value):
    def spoil(result):
        result.losses["loss_box_reg"] = result.losses["loss_box_reg"] * value

    return spoil


def gradient_becomes(value):
    def spoil(result):
        result.losses["loss_cls"].register_hook(lambda gradient: gradient * value)

    return spoil


def breaks_off(result):
    raise FloatingPointError(FAILURE)  # as Detectron2 does


@pytest.fixture
def spoiled(monkeypatch):
    """Spoils what the step gives in some iterations; returns the batches of all iterations."""

    def begin(spoil, iterations):
        batches = []

        def step(model, pseudo_labeler, batch, settings):
            batches.append(batch)
            result = training_step(model, pseudo_labeler, batch, settings)
            if len(batches) - 1 in iterations:
                spoil(result)
            return result

        monkeypatch.setattr(trainer_module, "training_step", step)
        return batches

    return begin


@pytest.fixture
def looked_at_each_time(monkeypatch):
    """What a step measured is read after it, and not when the next line is logged."""
    monkeypatch.setattr(metrics, "PERIOD", 1)


class States(HookBase):
    """All that an iteration could change, before the first and after each; the rates."""

    def __init__(self):
        self.seen, self.rates = [], []

    def before_train(self):
        self.after_step()

    def after_step(self):
        trainer = self.trainer
        optimizer = trainer.optimizer.torch_optimizer.state_dict()["state"]
        momenta = {i: s["momentum_buffer"].clone() for i, s in optimizer.items()}
        self.seen.append((copy_of(trainer.student), copy_of(trainer.teacher), momenta))
        self.rates.append(trainer.optimizer.torch_optimizer.param_groups[0]["lr"])


def states_of(trainer):
    states = States()
    trainer.register_hooks([states])
    trainer.train()
    return states


def lines_of(trainer):
    return [json.loads(line) for line in trainer._skipped.file.read_text().splitlines()]


CASES = {
    "a loss is NaN": (loss_becomes(math.nan), "loss_box_reg is nan"),
    "a loss is infinite": (loss_becomes(math.inf), "loss_box_reg is"),
    "a gradient is NaN": (gradient_becomes(math.nan), "the gradient of"),
    "a gradient is infinite": (gradient_becomes(math.inf), "the gradient of"),
    "the forward pass breaks off": (breaks_off, FAILURE),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("at", [1, 2])
def test_the_step_leaves_nothing_behind_and_training_goes_on(make_trainer, spoiled, case, at):
    """In burn-in and after it; the model has batch norm, whose statistics the step had changed."""
    spoil, problem = CASES[case]
    batches = spoiled(spoil, {at})
    trainer = make_trainer({"SOLVER.WARMUP_ITERS": 4})
    states = states_of(trainer)
    assert len(batches) == 4
    for part in range(3):
        kept = [same(a[part], b[part]) for a, b in zip(states.seen, states.seen[1:], strict=False)]
        assert kept == [i == at for i in range(4)]
    assert len(set(states.rates)) == 5  # its place in the schedule is used up

    (line,) = lines_of(trainer)
    assert line["iteration"] == at and line["process"] == 0
    assert problem in line["problem"]
    assert line["images"] == batches[at].file_names
    assert set(line["losses"]) >= ({"loss_cls", "loss_box_reg"} if "loss" in case else set())
    counts = [value for value, _ in trainer.storage.history("skipped_steps").values()]
    assert counts == [int(i >= at) for i in range(4)]
    finite = "gradient" in case  # then the losses are, and are logged
    logged = [int(i) for _, i in trainer.storage.history("total_loss").values()]
    assert logged == [i for i in range(4) if i != at or finite]


@pytest.mark.parametrize("most", [1, 2, 3])
@pytest.mark.usefixtures("looked_at_each_time")
def test_so_many_in_a_row_end_training(make_trainer, spoiled, most):
    batches = spoiled(loss_becomes(math.nan), range(1, 9))
    trainer = make_trainer({"SOLVER.MAX_SKIPPED_STEPS": most, "SOLVER.MAX_ITER": 9})
    with pytest.raises(UsageError) as error:
        trainer.train()
    assert len(batches) == 1 + most
    assert len(lines_of(trainer)) == most
    for part in (f"{most} steps in a row", "loss_box_reg is nan", str(trainer._skipped.file)):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("period", [2, 4])
def test_they_end_training_when_the_next_line_is_logged(make_trainer, spoiled, monkeypatch, period):
    """Until then nothing is lost by going on: each of them changes nothing."""
    monkeypatch.setattr(metrics, "PERIOD", period)
    batches = spoiled(loss_becomes(math.nan), range(9))
    trainer = make_trainer({"SOLVER.MAX_SKIPPED_STEPS": 3, "SOLVER.MAX_ITER": 9})
    start = copy_of(trainer.student)
    with pytest.raises(UsageError, match="3 steps in a row"):
        trainer.train()
    assert len(batches) == 4  # the first multiple of the period that is not below 3
    assert [line["iteration"] for line in lines_of(trainer)] == [0, 1, 2]
    assert [line["images"] for line in lines_of(trainer)] == [b.file_names for b in batches[:3]]
    assert same(copy_of(trainer.student), start)


def test_the_momentum_of_a_first_step_that_was_left_out_is_zero(make_trainer, spoiled):
    """PyTorch would leave it as it found the memory."""
    spoiled(gradient_becomes(math.nan), {0})
    trainer = make_trainer({"SOLVER.MAX_ITER": 1})
    trainer.train()
    momenta = [s["momentum_buffer"] for s in trainer.optimizer.torch_optimizer.state.values()]
    assert momenta and not any(momentum.any() for momentum in momenta)


def test_as_many_that_are_not_in_a_row_do_not(make_trainer, spoiled):
    spoiled(loss_becomes(math.nan), {0, 1, 3, 4})
    trainer = make_trainer({"SOLVER.MAX_SKIPPED_STEPS": 3, "SOLVER.MAX_ITER": 6})
    trainer.train()
    assert [line["iteration"] for line in lines_of(trainer)] == [0, 1, 3, 4]


@pytest.mark.usefixtures("looked_at_each_time")
def test_a_resumed_run_goes_on_counting(make_trainer, spoiled):
    """Two before the stop, one after it; what is done again is not written down twice."""
    settings = {
        "SOLVER.MAX_SKIPPED_STEPS": 3,
        "SOLVER.CHECKPOINT_PERIOD": 2,
        "SOLVER.MAX_ITER": 9,
    }

    class Stop(HookBase):
        def before_step(self):
            if self.trainer.iter == 3:
                raise KeyboardInterrupt

    spoiled(loss_becomes(math.nan), {0, 1, 2})
    trainer = make_trainer(settings | {"SOLVER.MAX_SKIPPED_STEPS": 4})
    trainer.register_hooks([Stop()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert [line["iteration"] for line in lines_of(trainer)] == [0, 1, 2]
    spoiled(loss_becomes(math.nan), {0})
    resumed = make_trainer(settings, resume=True)
    with pytest.raises(UsageError, match="3 steps in a row"):
        resumed.train()
    assert [line["iteration"] for line in lines_of(resumed)] == [0, 1, 2]


@pytest.mark.parametrize("most", [0, -1])
def test_none_at_all_cannot_be_asked_for(make_trainer, most):
    with pytest.raises(UsageError, match="SOLVER.MAX_SKIPPED_STEPS"):
        make_trainer({"SOLVER.MAX_SKIPPED_STEPS": most})


# --- the loss scale of float16 --------------------------------------------------------------------

FLOAT16 = {"SOLVER.AMP.ENABLED": True, "SOLVER.AMP.DTYPE": "float16", "SOLVER.MAX_ITER": 3}


def test_a_scale_that_is_too_large_comes_down_without_being_counted(make_trainer):
    trainer = make_trainer(FLOAT16 | {"SOLVER.MAX_SKIPPED_STEPS": 1})
    trainer.optimizer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    states = states_of(trainer)
    assert trainer.optimizer.grad_scaler.get_scale() == 2.0**37
    assert not trainer._skipped.file.exists()
    assert all(same(a[0], states.seen[0][0]) and same(a[1], a[0]) for a in states.seen)


def test_where_there_is_no_scale_left_it_is_counted(make_trainer, spoiled):
    spoiled(gradient_becomes(math.nan), {0, 1, 2})
    trainer = make_trainer(FLOAT16)
    trainer.optimizer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    trainer.train()
    assert [line["iteration"] for line in lines_of(trainer)] == [1, 2]


# --- parts ----------------------------------------------------------------------------------------


def gradient_problem(model):
    numbers = {name: x.item() for name, x in largest_in_gradients(model).items()}
    return StepReport([], 0.0, False, gradients=numbers).gradient_problem


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_single_number_in_a_gradient_is_found(value):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
    model[0].weight.grad = torch.ones(3, 3)
    assert gradient_problem(model) == ""
    model[1].bias.grad = torch.tensor([0.0, value])
    assert gradient_problem(model) == "the gradient of 1 parameters is not finite, such as 1.bias"


def test_gradients_may_be_as_large_as_a_number_can_be():
    """Their Euclidean length would be infinite."""
    model = torch.nn.Linear(3, 3)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.finfo(torch.float32).max)
    assert gradient_problem(model) == ""


def test_the_process_that_met_the_problem_is_named():
    fine = StepReport([], 0.0, False, losses={"a": 1.0})
    bad = StepReport([], 0.0, False, losses={"a": math.nan, "b": 2.0, "c": math.inf})
    assert describe_problems([fine, fine]) == ""
    assert describe_problems([fine, bad]) == "a is nan, c is inf in process 1"
