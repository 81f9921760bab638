"""The optimizer that leaves out what is not finite, on the device, and its older checkpoints."""

import copy

import pytest
import torch
from detectron2.solver import build_optimizer

from locreweight.engine.optimizer import SkipNonFiniteOptimizer
from tests.modeling.tiny_model import tiny_config

CLIPPED = {"SOLVER.CLIP_GRADIENTS.ENABLED": True, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 0.05}


def a_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2)
    )


def loss_of(model, i):
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(i))
    return (model(x) ** 2).mean()


def skipping(model, settings=None, dtype=torch.float32):
    return SkipNonFiniteOptimizer(tiny_config(settings), model, dtype)


@pytest.mark.parametrize("settings", [{}, CLIPPED, {"SOLVER.NESTEROV": True}])
def test_it_takes_the_steps_of_detectron2s_optimizer(settings):
    """Weight decay, bias learning rate and clipping as the config says; to rounding."""
    ours, theirs = a_model(), a_model()
    updates = skipping(ours, settings)
    optimizer = build_optimizer(tiny_config(settings), theirs)
    for i in range(4):
        updates.step(loss_of(ours, i))
        optimizer.zero_grad()
        loss_of(theirs, i).backward()
        optimizer.step()
    for mine, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_changes_nothing(factor):
    model = a_model()
    updates = skipping(model)
    updates.step(loss_of(model, 0))
    before = [p.detach().clone() for p in model.parameters()]
    largest = updates.step(loss_of(model, 1) * factor)
    assert not any(torch.isfinite(value) for value in largest.values())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    updates.step(loss_of(model, 2))
    assert not torch.equal(before[0], next(model.parameters()))


def test_an_infinite_loss_with_a_finite_gradient_changes_nothing():
    """Such as that of a sum which overflows: its derivative is 1."""
    model = a_model()
    updates = skipping(model)
    before = [p.detach().clone() for p in model.parameters()]
    updates.step(loss_of(model, 0) + torch.tensor(float("inf")))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_it_goes_on_from_a_checkpoint_of_detectron2s_own_optimizer():
    """Which asks for other kernels, and those cannot leave anything out."""
    model, other = a_model(), a_model()
    optimizer = build_optimizer(tiny_config(), other)
    loss_of(other, 0).backward()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["param_groups"][0]["foreach"]
    model.load_state_dict(other.state_dict())
    updates = skipping(model)
    updates.load_state_dict({"optimizer": saved, "grad_scaler": {}})
    before = [p.detach().clone() for p in model.parameters()]
    updates.step(loss_of(model, 1) * float("nan"))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    optimizer.zero_grad()
    loss_of(other, 2).backward()
    optimizer.step()
    updates.step(loss_of(model, 2))
    for mine, expected in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-7)


def test_only_float16_has_a_loss_scale():
    model = a_model()
    amp = {"SOLVER.AMP.ENABLED": True}
    assert skipping(model, amp, torch.bfloat16).loss_scale == {}
    scale = skipping(model, amp, torch.float16).loss_scale["loss_scale"]
    assert scale.item() == 2.0**16 and scale.device == next(model.parameters()).device
    assert skipping(model, {}, torch.float16).loss_scale == {}
