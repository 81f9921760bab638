"""Steps with non-finite losses or gradients are skipped, and training continues."""

import json
import math

import pytest
import torch
from detectron2.engine import HookBase

from locreweight.engine import trainer as trainer_module
from locreweight.engine import writers
from locreweight.engine.optimizer import largest_in_gradients
from locreweight.engine.step_metrics import StepReport, describe_problems
from locreweight.engine.training_step import training_step
from locreweight.errors import UsageError
from tests.engine.tiny_training import copy_of, same

FAILURE = "Predicted boxes or scores contain Inf/NaN"


def multiply_loss(value):
    def spoil(result):
        result.losses["loss_box_reg"] = result.losses["loss_box_reg"] * value

    return spoil


def multiply_gradient(value):
    def spoil(result):
        result.losses["loss_cls"].register_hook(lambda gradient: gradient * value)

    return spoil


def fail(result):
    raise FloatingPointError(FAILURE)  # as Detectron2 does


@pytest.fixture
def spoiled(monkeypatch):
    """Spoils the results of some steps; returns the batches of all steps."""

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
def metrics_after_each_step(monkeypatch):
    """Metrics are fetched after each step."""
    monkeypatch.setattr(writers, "PERIOD", 1)


class States(HookBase):
    """Models, momenta and learning rate before the first and after each iteration."""

    def __init__(self):
        self.states, self.rates = [], []

    def before_train(self):
        self.after_step()

    def after_step(self):
        trainer = self.trainer
        optimizer = trainer.optimizer.torch_optimizer.state_dict()["state"]
        momenta = {i: s["momentum_buffer"].clone() for i, s in optimizer.items()}
        self.states.append((copy_of(trainer.student), copy_of(trainer.teacher), momenta))
        self.rates.append(trainer.optimizer.torch_optimizer.param_groups[0]["lr"])


def train_with_states(trainer):
    states = States()
    trainer.register_hooks([states])
    trainer.train()
    return states


def lines_of(trainer):
    return [json.loads(line) for line in trainer._skipped.file.read_text().splitlines()]


CASES = {
    "a loss is NaN": (multiply_loss(math.nan), "loss_box_reg is nan"),
    "a loss is infinite": (multiply_loss(math.inf), "loss_box_reg is"),
    "a gradient is NaN": (multiply_gradient(math.nan), "the gradient of"),
    "a gradient is infinite": (multiply_gradient(math.inf), "the gradient of"),
    "the forward pass fails": (fail, FAILURE),
}


@pytest.mark.parametrize(
    ("case", "at"),
    [(case, 2) for case in CASES] + [(case, 1) for case in CASES if "infinite" not in case],
)
def test_skipped_step_changes_nothing_and_training_continues(make_trainer, spoiled, case, at):
    """During and after burn-in. The model has batch norm, whose statistics the step changes."""
    spoil, problem = CASES[case]
    batches = spoiled(spoil, {at})
    trainer = make_trainer({"SOLVER.WARMUP_ITERS": 4})
    states = train_with_states(trainer)
    assert len(batches) == 4
    for part in range(3):
        kept = [
            same(a[part], b[part]) for a, b in zip(states.states, states.states[1:], strict=False)
        ]
        assert kept == [i == at for i in range(4)]
    assert len(set(states.rates)) == 5  # the learning rate schedule continues

    (line,) = lines_of(trainer)
    assert line["iteration"] == at and line["process"] == 0
    assert problem in line["problem"]
    assert line["images"] == batches[at].file_names
    assert set(line["losses"]) >= ({"loss_cls", "loss_box_reg"} if "loss" in case else set())
    counts = [value for value, _ in trainer.storage.history("skipped_steps").values()]
    assert counts == [int(i >= at) for i in range(4)]
    finite = "gradient" in case  # then the losses are finite and logged
    logged = [int(i) for _, i in trainer.storage.history("total_loss").values()]
    assert logged == [i for i in range(4) if i != at or finite]


@pytest.mark.parametrize("most", [1, 2, 3])
@pytest.mark.usefixtures("metrics_after_each_step")
def test_too_many_skipped_steps_in_a_row_stop_training(make_trainer, spoiled, most):
    batches = spoiled(multiply_loss(math.nan), range(1, 9))
    trainer = make_trainer({"SOLVER.MAX_SKIPPED_STEPS": most, "SOLVER.MAX_ITER": 9})
    with pytest.raises(UsageError) as error:
        trainer.train()
    assert len(batches) == 1 + most
    assert len(lines_of(trainer)) == most
    for part in (f"{most} steps in a row", "loss_box_reg is nan", str(trainer._skipped.file)):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("period", [2, 4])
def test_training_stops_when_metrics_are_fetched(make_trainer, spoiled, monkeypatch, period):
    """Skipped steps change nothing, so nothing is lost until then."""
    monkeypatch.setattr(writers, "PERIOD", period)
    batches = spoiled(multiply_loss(math.nan), range(9))
    trainer = make_trainer({"SOLVER.MAX_SKIPPED_STEPS": 3, "SOLVER.MAX_ITER": 9})
    start = copy_of(trainer.student)
    with pytest.raises(UsageError, match="3 steps in a row"):
        trainer.train()
    assert len(batches) == 4  # the first multiple of the period from 3 on
    assert [line["iteration"] for line in lines_of(trainer)] == [0, 1, 2]
    assert [line["images"] for line in lines_of(trainer)] == [b.file_names for b in batches[:3]]
    assert same(copy_of(trainer.student), start)


def test_momentum_is_zero_after_a_skipped_first_step(make_trainer, spoiled):
    """PyTorch alone would leave it uninitialized."""
    spoiled(multiply_gradient(math.nan), {0})
    trainer = make_trainer({"SOLVER.MAX_ITER": 1})
    trainer.train()
    momenta = [s["momentum_buffer"] for s in trainer.optimizer.torch_optimizer.state.values()]
    assert momenta and not any(momentum.any() for momentum in momenta)


def test_skipped_steps_that_are_not_in_a_row_do_not_stop_training(make_trainer, spoiled):
    spoiled(multiply_loss(math.nan), {0, 1, 3, 4})
    trainer = make_trainer({"SOLVER.MAX_SKIPPED_STEPS": 3, "SOLVER.MAX_ITER": 6})
    trainer.train()
    assert [line["iteration"] for line in lines_of(trainer)] == [0, 1, 3, 4]


@pytest.mark.usefixtures("metrics_after_each_step")
def test_resumed_run_continues_counting(make_trainer, spoiled):
    """Two before the stop, one after it; a repeated step is recorded once."""
    settings = {
        "SOLVER.MAX_SKIPPED_STEPS": 3,
        "SOLVER.CHECKPOINT_PERIOD": 2,
        "SOLVER.MAX_ITER": 9,
    }

    class Stop(HookBase):
        def before_step(self):
            if self.trainer.iter == 3:
                raise KeyboardInterrupt

    spoiled(multiply_loss(math.nan), {0, 1, 2})
    trainer = make_trainer(settings | {"SOLVER.MAX_SKIPPED_STEPS": 4})
    trainer.register_hooks([Stop()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert [line["iteration"] for line in lines_of(trainer)] == [0, 1, 2]
    spoiled(multiply_loss(math.nan), {0})
    resumed = make_trainer(settings, resume=True)
    with pytest.raises(UsageError, match="3 steps in a row"):
        resumed.train()
    assert [line["iteration"] for line in lines_of(resumed)] == [0, 1, 2]


@pytest.mark.parametrize("most", [0, -1])
def test_max_skipped_steps_must_be_positive(make_trainer, most):
    with pytest.raises(UsageError, match="SOLVER.MAX_SKIPPED_STEPS"):
        make_trainer({"SOLVER.MAX_SKIPPED_STEPS": most})


# --- the loss scale of float16 --------------------------------------------------------------------

FLOAT16 = {"SOLVER.AMP.ENABLED": True, "SOLVER.AMP.DTYPE": "float16", "SOLVER.MAX_ITER": 3}


def test_lowering_the_loss_scale_is_not_counted(make_trainer):
    trainer = make_trainer(FLOAT16 | {"SOLVER.MAX_SKIPPED_STEPS": 1})
    trainer.optimizer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    states = train_with_states(trainer)
    assert trainer.optimizer.grad_scaler.get_scale() == 2.0**37
    assert not trainer._skipped.file.exists()
    assert all(same(a[0], states.states[0][0]) and same(a[1], a[0]) for a in states.states)


def test_infinite_gradient_at_the_lowest_loss_scale_is_counted(make_trainer, spoiled):
    spoiled(multiply_gradient(math.nan), {0, 1, 2})
    trainer = make_trainer(FLOAT16)
    trainer.optimizer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    trainer.train()
    assert [line["iteration"] for line in lines_of(trainer)] == [1, 2]


# --- problems -------------------------------------------------------------------------------------


def gradient_problem(model):
    numbers = {name: x.item() for name, x in largest_in_gradients(model).items()}
    return StepReport([], 0.0, False, gradients=numbers).gradient_problem


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_single_non_finite_value_in_a_gradient_is_found(value):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
    model[0].weight.grad = torch.ones(3, 3)
    assert gradient_problem(model) == ""
    model[1].bias.grad = torch.tensor([0.0, value])
    assert gradient_problem(model) == "the gradient of 1 parameters is not finite, such as 1.bias"


def test_largest_finite_gradients_are_not_a_problem():
    """Their L2 norm would be infinite."""
    model = torch.nn.Linear(3, 3)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.finfo(torch.float32).max)
    assert gradient_problem(model) == ""


def test_describe_problems_names_the_process():
    fine = StepReport([], 0.0, False, losses={"a": 1.0})
    bad = StepReport([], 0.0, False, losses={"a": math.nan, "b": 2.0, "c": math.inf})
    assert describe_problems([fine, fine]) == ""
    assert describe_problems([fine, bad]) == "a is nan, c is inf in process 1"
