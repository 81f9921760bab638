"""The teacher: an exponential moving average (EMA) of the student (Sec. 3.1)."""

from __future__ import annotations

from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn


def keep_rate(step: int, final: float) -> float:
    """Share of itself that the teacher keeps in its update number ``step``.

    The ramp makes the teacher the plain mean of all students so far until ``final`` is reached;
    a constant rate would hold on to the first one for thousands of iterations. At step 0 the rate
    is 0: the teacher becomes a copy of the student.

    Args:
        step: number of updates made before this one, at least 0.
        final: the rate it ends at, in [0, 1].

    Raises:
        ValueError: for values outside of these ranges.
    """
    if step < 0 or not 0.0 <= final <= 1.0:
        raise ValueError(f"keep_rate needs step >= 0 and 0 <= final <= 1, got {step} and {final}")
    return min(final, 1.0 - 1.0 / (step + 1))


class MovingAverage:
    """The EMA of one student, with all that can be done once done once.

    Holds on to the modules' tensors: these may change their values, not be replaced by others.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module) -> None:
        """
        Args:
            teacher, student: modules of one architecture on one device; neither wrapped in
                ``DistributedDataParallel``. The teacher's parameters are left with
                ``requires_grad`` off and without gradient.

        Raises:
            ValueError: if names or shapes of the two differ.
        """
        targets, sources = _named_tensors(teacher), _named_tensors(student)
        _check_alike(targets, sources)
        for parameter in teacher.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        pairs = [(targets[name], sources[name].detach()) for name in targets]
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, keep_rate: float) -> None:
        """``teacher = keep_rate * teacher + (1 - keep_rate) * student``, in place.

        Floating-point parameters and buffers are averaged in a few fused kernels, without a
        temporary of the size of the model; integer and boolean buffers (counters) are copied.

        Args:
            keep_rate: in [0, 1]; 0 copies the student, 1 leaves the teacher alone.

        Raises:
            ValueError: for a rate outside of [0, 1]; nothing has been changed then.
        """
        if not 0.0 <= keep_rate <= 1.0:
            raise ValueError(f"keep_rate must lie in [0, 1], got {keep_rate}")
        if keep_rate == 1.0:
            # Not an interpolation: 0 * inf would let a student that goes wrong through.
            return
        copied, averaged = self._copied, self._averaged
        if keep_rate == 0.0:
            # Neither: 0 * inf would keep a teacher that once went wrong wrong.
            copied, averaged = copied + averaged, []
        for pairs, operation in (
            (copied, torch._foreach_copy_),
            (averaged, partial(torch._foreach_lerp_, weight=1.0 - keep_rate)),
        ):
            if pairs:
                operation([old for old, _ in pairs], [new for _, new in pairs])


def update_teacher(teacher: nn.Module, student: nn.Module, keep_rate: float) -> None:
    """One update of a teacher, by :class:`MovingAverage`, whose arguments and errors it shares."""
    MovingAverage(teacher, student).update(keep_rate)


def _named_tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(chain(module.named_parameters(), module.named_buffers()))


def _check_alike(targets: dict[str, Tensor], sources: dict[str, Tensor]) -> None:
    if targets.keys() != sources.keys():
        odd = sorted(targets.keys() ^ sources.keys())
        raise ValueError(f"teacher and student differ in {len(odd)} tensors, the first: {odd[:5]}")
    for name, target in targets.items():
        if target.shape != sources[name].shape:
            raise ValueError(
                f"teacher and student differ in the shape of {name}: "
                f"{tuple(target.shape)} and {tuple(sources[name].shape)}"
            )
