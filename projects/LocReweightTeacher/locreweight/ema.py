"""Teacher as the exponential moving average (EMA) of the student (Sec. 3.1)."""

from __future__ import annotations

from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn


def keep_rate(step: int, final: float) -> float:
    """Compute the EMA keep rate, the fraction of its weights that the teacher keeps in an update.

    The rate is ``min(final, 1 - 1 / (step + 1))``. Until it reaches ``final``, the teacher is the
    plain mean of all students so far. With a constant rate, the first student would dominate for
    thousands of iterations. At step 0 the rate is 0, and the teacher becomes a copy of the student.

    Args:
        step: number of updates before this one, at least 0.
        final: final rate, in [0, 1].

    Raises:
        ValueError: if an argument is out of range.
    """
    if step < 0 or not 0.0 <= final <= 1.0:
        raise ValueError(f"keep_rate needs step >= 0 and 0 <= final <= 1, got {step} and {final}")
    return min(final, 1.0 - 1.0 / (step + 1))


def highest_keep_rate(iterations: int) -> float:
    """Highest suitable final keep rate for a number of iterations after burn-in.

    A teacher with the rate ``r`` averages about ``1 / (1 - r)`` students. These should be much
    fewer than all students after burn-in.
    """
    return 0.99 if iterations < 2000 else 0.999 if iterations < 20_000 else 1.0


class MovingAverage:
    """EMA of a student that is updated many times.

    The tensors of both modules are collected once, in the constructor. Later their values may
    change, but they must not be replaced by other tensors.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module) -> None:
        """
        Args:
            teacher, student: modules of the same architecture on the same device, not wrapped in
                ``DistributedDataParallel``. ``requires_grad`` of the teacher's parameters is set to
                False and their gradients are removed.

        Raises:
            ValueError: if the names or shapes of their tensors differ.
        """
        targets, sources = _named_tensors(teacher), _named_tensors(student)
        _check_same_tensors(targets, sources)
        for parameter in teacher.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        pairs = [(targets[name], sources[name].detach()) for name in targets]
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, keep_rate: float) -> None:
        """Set ``teacher = keep_rate * teacher + (1 - keep_rate) * student`` in place.

        Floating-point parameters and buffers are averaged by a few fused kernels, without a
        temporary copy of the model. Integer and boolean buffers, such as counters, are copied.

        Args:
            keep_rate: in [0, 1]; 0 copies the student, 1 leaves the teacher unchanged.

        Raises:
            ValueError: if the rate is out of range. The teacher is unchanged in this case.
        """
        if not 0.0 <= keep_rate <= 1.0:
            raise ValueError(f"keep_rate must lie in [0, 1], got {keep_rate}")
        if keep_rate == 1.0:
            # Interpolation would compute 0 * inf = NaN for a student with infinite weights.
            return
        copied, averaged = self._copied, self._averaged
        if keep_rate == 0.0:
            # Interpolation would compute 0 * inf = NaN for a teacher with infinite weights.
            copied, averaged = copied + averaged, []
        for pairs, operation in (
            (copied, torch._foreach_copy_),
            (averaged, partial(torch._foreach_lerp_, weight=1.0 - keep_rate)),
        ):
            if pairs:
                operation([old for old, _ in pairs], [new for _, new in pairs])


def update_teacher(teacher: nn.Module, student: nn.Module, keep_rate: float) -> None:
    """Update a teacher once. For arguments and errors see :class:`MovingAverage`."""
    MovingAverage(teacher, student).update(keep_rate)


def _named_tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(chain(module.named_parameters(), module.named_buffers()))


def _check_same_tensors(targets: dict[str, Tensor], sources: dict[str, Tensor]) -> None:
    if targets.keys() != sources.keys():
        names = sorted(targets.keys() ^ sources.keys())
        raise ValueError(
            f"{len(names)} tensors exist in only one of teacher and student, such as {names[:5]}"
        )
    for name, target in targets.items():
        if target.shape != sources[name].shape:
            raise ValueError(
                f"shape of {name} is {tuple(target.shape)} in the teacher and "
                f"{tuple(sources[name].shape)} in the student"
            )
