"""Keep rate and update of the EMA teacher (Sec. 3.1)."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from locreweight.ema import keep_rate, update_teacher

RATES = [0.0, 0.25, 0.9, 0.9996, 1.0]


class Network(nn.Module):
    """Module with random parameters and buffers of every kind."""

    def __init__(self, width=2):
        super().__init__()
        self.linear = nn.Linear(3, width)
        self.norm = nn.BatchNorm1d(width)
        self.register_buffer("anchors", torch.empty(5), persistent=False)
        self.register_buffer("count", torch.randint(1000, (3,)))
        self.register_buffer("mask", torch.rand(16) < 0.5)
        for tensor in tensors_of(self).values():
            if tensor.is_floating_point():
                tensor.data.normal_()

    def forward(self, x):
        return self.norm(self.linear(x))


def tensors_of(module):
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def copies_of(module):
    return {name: tensor.detach().clone() for name, tensor in tensors_of(module).items()}


def assert_equals(module, expected):
    assert_close(copies_of(module), expected, rtol=0, atol=0)


# keep_rate


@pytest.mark.parametrize(
    ("step", "final", "expected"),
    [
        (0, 0.9996, 0.0),
        (1, 0.9996, 0.5),
        (3, 0.9996, 0.75),
        (2498, 0.9996, 2498 / 2499),
        (2499, 0.9996, 0.9996),
        (10**9, 0.9996, 0.9996),
        (0, 1.0, 0.0),
        (9, 1.0, 0.9),
        (0, 0.0, 0.0),
        (9, 0.0, 0.0),
        (1, 0.25, 0.25),
    ],
)
def test_keep_rate_ramps_up_to_its_final_value(step, final, expected):
    assert keep_rate(step, final) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(("step", "final"), [(-1, 0.5), (0, -0.1), (0, 1.1), (0, math.nan)])
def test_keep_rate_rejects_values_out_of_range(step, final):
    with pytest.raises(ValueError, match=f"got {step} and {final}"):
        keep_rate(step, final)


def test_teacher_is_the_mean_of_all_students_during_the_ramp():
    teacher, students = Network().double(), [Network().double() for _ in range(7)]
    for step, student in enumerate(students):
        update_teacher(teacher, student, keep_rate(step, 0.9996))
        states = [copies_of(s) for s in students[: step + 1]]
        for name, tensor in tensors_of(teacher).items():
            values = torch.stack([state[name] for state in states])
            expected = values.mean(dim=0) if tensor.is_floating_point() else values[-1]
            assert_close(tensor.detach(), expected, rtol=1e-13, atol=1e-13)


# update_teacher


@pytest.mark.parametrize("rate", RATES[:-1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_update_matches_a_loop_over_tensors(rate, dtype):
    teacher, student = Network().to(dtype), Network().to(dtype)
    old, new = copies_of(teacher), copies_of(student)
    update_teacher(teacher, student, rate)
    for name, tensor in copies_of(teacher).items():
        if tensor.is_floating_point():
            mean = rate * old[name].double() + (1 - rate) * new[name].double()
            assert_close(tensor, mean.to(dtype))
        else:
            assert_close(tensor, new[name], rtol=0, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rate_0_copies_the_student_over_a_non_finite_teacher(value):
    teacher, student = Network(), Network()
    for parameter in teacher.parameters():
        parameter.data.fill_(value)
    update_teacher(teacher, student, 0.0)
    assert_equals(teacher, copies_of(student))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rate_1_keeps_the_teacher_if_the_student_is_non_finite(value):
    teacher, student = Network(), Network()
    for parameter in student.parameters():
        parameter.data.fill_(value)
    before = copies_of(teacher)
    update_teacher(teacher, student, 1.0)
    assert_equals(teacher, before)


@pytest.mark.parametrize("rate", RATES)
def test_update_does_not_change_the_student(rate):
    teacher, student = Network(), Network()
    student(torch.randn(4, 3)).square().sum().backward()
    before = copies_of(student)
    gradients = [parameter.grad.clone() for parameter in student.parameters()]
    update_teacher(teacher, student, rate)
    assert_equals(student, before)
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert_close([parameter.grad for parameter in student.parameters()], gradients)


@pytest.mark.parametrize("rate", RATES)
def test_update_is_in_place_and_shares_no_memory_with_the_student(rate):
    teacher, student = Network(), Network()
    tensors = tensors_of(teacher)
    addresses = [tensor.data_ptr() for tensor in tensors.values()]
    update_teacher(teacher, student, rate)
    after = copies_of(teacher)
    for tensor in tensors_of(student).values():
        tensor.data.zero_()
    assert [tensor.data_ptr() for tensor in tensors.values()] == addresses
    assert all(tensors[name] is tensor for name, tensor in tensors_of(teacher).items())
    assert_equals(teacher, after)


@pytest.mark.parametrize("rate", RATES)
def test_teacher_has_no_gradient_after_an_update(rate):
    teacher, student = Network(), Network()
    teacher(torch.randn(4, 3)).square().sum().backward()
    update_teacher(teacher, student, rate)
    for parameter in teacher.parameters():
        assert parameter.grad is None
        assert not parameter.requires_grad
    assert not teacher(torch.randn(4, 3)).requires_grad


def test_shared_parameters_are_averaged_once():
    student = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    student[1].weight = student[0].weight
    teacher = copy.deepcopy(student)
    nn.init.zeros_(teacher[0].weight)
    update_teacher(teacher, student, 0.75)
    assert teacher[1].weight is teacher[0].weight
    assert_close(teacher[0].weight.detach(), 0.25 * student[0].weight.detach())


def test_running_statistics_of_a_training_student_are_averaged():
    student = Network().double().train()
    teacher = copy.deepcopy(student).eval()
    means = []
    for step in range(3):
        student(torch.randn(8, 3, dtype=torch.float64))
        update_teacher(teacher, student, keep_rate(step, 0.9996))
        means.append(student.norm.running_mean.clone())
    assert_close(teacher.norm.running_mean, torch.stack(means).mean(dim=0))
    assert teacher.norm.num_batches_tracked == 3


def test_module_without_floating_point_tensors_is_copied():
    teacher, student = nn.Module(), nn.Module()
    teacher.register_buffer("count", torch.tensor(1))
    student.register_buffer("count", torch.tensor(5))
    update_teacher(teacher, student, 0.5)
    assert teacher.count == 5


class Wrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.module = Network()


def without_buffer():
    student = Network()
    del student.mask
    return student


def with_more():
    student = Network()
    student.extra = nn.Linear(1, 1)
    return student


@pytest.mark.parametrize(
    ("make_student", "message"),
    [
        (without_buffer, r"1 tensors .* such as \['mask'\]"),
        (with_more, r"2 tensors .* such as \['extra.bias', 'extra.weight'\]"),
        (Wrapper, "20 tensors"),
        (lambda: Network(width=1), r"linear.weight is \(2, 3\) in the teacher and \(1, 3\)"),
    ],
    ids=["missing", "extra", "wrapped", "shape that would broadcast"],
)
def test_different_modules_are_rejected_and_the_teacher_is_unchanged(make_student, message):
    teacher = Network()
    teacher(torch.randn(4, 3)).square().sum().backward()
    before, gradient = copies_of(teacher), teacher.linear.weight.grad.clone()
    with pytest.raises(ValueError, match=message):
        update_teacher(teacher, make_student(), 0.5)
    assert_equals(teacher, before)
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    assert_close(teacher.linear.weight.grad, gradient, rtol=0, atol=0)


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_update_rejects_rates_out_of_range(rate):
    teacher, student = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    before = teacher.weight.clone()
    with pytest.raises(ValueError, match="keep_rate"):
        update_teacher(teacher, student, rate)
    assert torch.equal(teacher.weight, before)
