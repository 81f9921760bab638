"""Estimate of the remaining time of a training: burn-in, mutual learning and evaluations."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from statistics import mean

from detectron2.config import CfgNode

# A forward pass costs about a third of a forward and backward pass.
_FORWARD = 1 / 3
_RECENT = 200  # number of durations that are averaged: recent ones, because the load may change


class Work(Enum):
    """Kinds of work with different durations."""

    BURN_IN = "an iteration of burn-in"
    MUTUAL = "an iteration of mutual learning"
    EVALUATION = "the evaluation of one model"


@dataclass(frozen=True)
class Schedule:
    """When a training does what.

    Attributes:
        max_iter: number of iterations.
        burn_in: number of iterations of burn-in, at most ``max_iter``.
        eval_period: iterations between evaluations; 0 for the last iteration only.
        amount: kind of work -> amount of work, in forward and backward passes of an image.
            Evaluation is 0 without a test set.
    """

    max_iter: int
    burn_in: int
    eval_period: int
    amount: dict[Work, float]

    @classmethod
    def from_config(cls, cfg: CfgNode, test_images: int) -> Schedule:
        """
        Args:
            cfg: scaled to the number of GPUs.
            test_images: number of images in ``DATASETS.TEST``.
        """
        labeled, unlabeled = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.IMS_PER_BATCH_UNLABELED
        return cls(
            max_iter=cfg.SOLVER.MAX_ITER,
            burn_in=min(cfg.SEMI.BURN_IN_ITERS, cfg.SOLVER.MAX_ITER),
            eval_period=cfg.TEST.EVAL_PERIOD,
            amount={
                Work.BURN_IN: labeled,
                # The teacher labels the unlabeled images.
                Work.MUTUAL: labeled + unlabeled * (1 + _FORWARD),
                Work.EVALUATION: test_images * _FORWARD,
            },
        )

    def step(self, done: int) -> Work:
        """The kind of the iteration that is number ``done``, counted from 1."""
        return Work.BURN_IN if done <= self.burn_in else Work.MUTUAL

    def evaluated_models(self, done: int) -> int:
        """Number of models that are evaluated after ``done`` iterations."""
        is_periodic = self.eval_period > 0 and done % self.eval_period == 0
        if not self.amount[Work.EVALUATION] or not (is_periodic or done == self.max_iter):
            return 0
        return 1 if done <= self.burn_in else 2  # in burn-in, teacher and student are the same

    def remaining(self, done: int) -> dict[Work, int]:
        """Number of iterations and model evaluations after ``done`` iterations, without zeros."""
        burn_in = max(0, self.burn_in - done)
        counts = {Work.BURN_IN: burn_in, Work.MUTUAL: self.max_iter - done - burn_in}
        counts[Work.EVALUATION] = self._evaluations(self.max_iter) - self._evaluations(done)
        return {work: count for work, count in counts.items() if count}

    def _evaluations(self, done: int) -> int:
        """Number of model evaluations in the first ``done`` iterations."""
        if not self.amount[Work.EVALUATION]:
            return 0
        period = self.eval_period
        in_burn_in, all_ = (min(done, self.burn_in) // period, done // period) if period else (0, 0)
        is_extra = done == self.max_iter and (not period or done % period)
        return 2 * all_ - in_burn_in + (self.evaluated_models(done) if is_extra else 0)


@dataclass(frozen=True)
class Estimate:
    """A remaining time.

    Attributes:
        seconds: the time.
        is_measured: whether all kinds of work that remain have been measured. If not, their
            durations are estimated from their amounts of work.
    """

    seconds: float
    is_measured: bool

    def __str__(self) -> str:
        return f"{'' if self.is_measured else 'about '}{format_duration(self.seconds)} left"


class RemainingTime:
    """Estimates the remaining time of a training from the durations of its iterations."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self._durations: dict[Work, deque[float]] = {work: deque(maxlen=_RECENT) for work in Work}

    def add(self, done: int, seconds: float) -> None:
        """Record the duration of an iteration with all its hooks.

        Args:
            done: number of the iteration, counted from 1.
            seconds: the duration.
        """
        work, models = self.schedule.step(done), self.schedule.evaluated_models(done)
        if not models:
            self._durations[work].append(seconds)
        elif step := self._seconds_of(work):
            self._durations[Work.EVALUATION].append(max(0.0, seconds - step) / models)

    def estimate(self, done: int) -> Estimate | None:
        """Estimate the time after ``done`` iterations; None if nothing has been measured."""
        remaining = self.schedule.remaining(done)
        seconds = {work: self._seconds_of(work) for work in remaining}
        if None in seconds.values():
            return None
        return Estimate(
            sum(count * (seconds[work] or 0.0) for work, count in remaining.items()),
            all(self._durations[work] for work in remaining),
        )

    def seconds_per_step(self, done: int) -> float | None:
        """Seconds per iteration like number ``done``; None if nothing has been measured."""
        return self._seconds_of(self.schedule.step(done))

    def _seconds_of(self, work: Work) -> float | None:
        if self._durations[work]:
            return mean(self._durations[work])
        amount = self.schedule.amount
        for measured in (Work.MUTUAL, Work.BURN_IN):
            if self._durations[measured]:
                return mean(self._durations[measured]) * amount[work] / amount[measured]
        return None


def format_duration(seconds: float) -> str:
    """Format as ``m:ss`` or ``h:mm:ss``."""
    return str(timedelta(seconds=round(seconds))).removeprefix("0:").removeprefix("0")
