"""SkipNonFiniteOptimizer."""

import copy

import pytest
import torch
from detectron2.solver import build_optimizer

from locreweight.engine.optimizer import SkipNonFiniteOptimizer
from tests.modeling.tiny_model import tiny_config

ADAMW = {"SOLVER.OPTIMIZER": "AdamW", "SOLVER.BASE_LR": 0.01}
CLIPPED = {"SOLVER.CLIP_GRADIENTS.ENABLED": True, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 0.05}


def make_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2)
    )


def loss_of(model, i):
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(i))
    return (model(x.to(model[0].weight.dtype)) ** 2).mean()


def make_optimizer(model, settings=None, dtype=torch.float32):
    return SkipNonFiniteOptimizer(tiny_config(settings), model, dtype)


@pytest.mark.parametrize("settings", [{}, CLIPPED, {"SOLVER.NESTEROV": True}])
def test_steps_equal_detectron2s_optimizer(settings):
    """With the configured weight decay, bias learning rate and clipping, up to rounding."""
    ours, theirs = make_model(), make_model()
    skipping = make_optimizer(ours, settings)
    optimizer = build_optimizer(tiny_config(settings), theirs)
    for i in range(4):
        skipping.step(loss_of(ours, i))
        optimizer.zero_grad()
        loss_of(theirs, i).backward()
        optimizer.step()
    for mine, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("settings", [{}, CLIPPED])
def test_steps_equal_adamw_of_pytorch(settings):
    """With Detectron2's weight decay of norms, bias learning rate and clipping."""
    decay = {"SOLVER.WEIGHT_DECAY": 0.5, "SOLVER.BIAS_LR_FACTOR": 2.0} | settings
    # In float32, AdamW amplifies rounding: the bias before the norm has no other gradient.
    ours, theirs = make_model().double(), make_model().double()
    skipping = make_optimizer(ours, ADAMW | decay)
    groups = [
        {
            "params": [parameter],
            "lr": 0.02 if name.endswith("bias") else 0.01,
            "weight_decay": 0.0 if name.startswith("1.") else 0.5,
        }
        for name, parameter in theirs.named_parameters()
    ]
    adam = torch.optim.AdamW(groups, foreach=False)
    for i in range(4):
        skipping.step(loss_of(ours, i))
        adam.zero_grad()
        loss_of(theirs, i).backward()
        if settings:
            torch.nn.utils.clip_grad_value_(theirs.parameters(), 0.05)
        adam.step()
    for mine, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-7)


def test_adamw_counts_no_skipped_step():
    """Neither its moments nor its bias correction change, also if the first step is skipped."""
    skipped, straight = make_model(), make_model()
    first, second = make_optimizer(skipped, ADAMW), make_optimizer(straight, ADAMW)
    for i, factor in enumerate([float("nan"), 1.0, float("inf"), 1.0]):
        first.step(loss_of(skipped, i) * factor)
        if factor == 1.0:
            second.step(loss_of(straight, i))
    assert all(map(torch.equal, skipped.parameters(), straight.parameters()))


@pytest.mark.parametrize(("saved", "resumed"), [({}, ADAMW), (ADAMW, {})])
def test_state_of_another_optimizer_is_an_error(saved, resumed):
    model = make_model()
    optimizer = make_optimizer(model, saved)
    optimizer.step(loss_of(model, 0))
    with pytest.raises(ValueError, match=r"another SOLVER\.OPTIMIZER"):
        make_optimizer(model, resumed).load_state_dict(optimizer.state_dict())


def test_forward_pass_has_the_memory_of_the_last_gradients():
    model = make_model()
    make_optimizer(model).step(loss_of(model, 0))
    assert all(p.grad is None for p in model.parameters())


def test_adamw_resumes_exactly():
    model = make_model()
    optimizer = make_optimizer(model, ADAMW)
    optimizer.step(loss_of(model, 0))
    copied = copy.deepcopy(model)
    resumed = make_optimizer(copied, ADAMW)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for i in (1, 2):
        optimizer.step(loss_of(model, i))
        resumed.step(loss_of(copied, i))
    assert all(map(torch.equal, model.parameters(), copied.parameters()))


@pytest.mark.parametrize("settings", [{}, ADAMW])
@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_non_finite_loss_changes_nothing(factor, settings):
    model = make_model()
    skipping = make_optimizer(model, settings)
    skipping.step(loss_of(model, 0))
    before = [p.detach().clone() for p in model.parameters()]
    largest = skipping.step(loss_of(model, 1) * factor)
    assert not any(torch.isfinite(value) for value in largest.values())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    skipping.step(loss_of(model, 2))
    assert not torch.equal(before[0], next(model.parameters()))


def test_infinite_loss_with_finite_gradient_changes_nothing():
    """A sum that overflows has the derivative 1."""
    model = make_model()
    skipping = make_optimizer(model)
    before = [p.detach().clone() for p in model.parameters()]
    skipping.step(loss_of(model, 0) + torch.tensor(float("inf")))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_state_of_detectron2s_optimizer_can_be_loaded():
    """It names other kernels, which cannot skip a step."""
    model, other = make_model(), make_model()
    optimizer = build_optimizer(tiny_config(), other)
    loss_of(other, 0).backward()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["param_groups"][0]["foreach"]
    model.load_state_dict(other.state_dict())
    skipping = make_optimizer(model)
    skipping.load_state_dict({"optimizer": saved, "grad_scaler": {}})
    before = [p.detach().clone() for p in model.parameters()]
    skipping.step(loss_of(model, 1) * float("nan"))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    optimizer.zero_grad()
    loss_of(other, 2).backward()
    optimizer.step()
    skipping.step(loss_of(model, 2))
    for mine, expected in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-7)


def test_only_float16_has_a_loss_scale():
    model = make_model()
    amp = {"SOLVER.AMP.ENABLED": True}
    assert make_optimizer(model, amp, torch.bfloat16).loss_scale == {}
    scale = make_optimizer(model, amp, torch.float16).loss_scale["loss_scale"]
    assert scale.item() == 2.0**16 and scale.device == next(model.parameters()).device
    assert make_optimizer(model, {}, torch.float16).loss_scale == {}
