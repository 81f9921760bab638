"""Remaining time of a training, on a simulated clock."""

import pytest

from locreweight.engine.remaining_time import (
    Estimate,
    RemainingTime,
    Schedule,
    Work,
    format_duration,
)
from tests.modeling.tiny_model import tiny_config

SECONDS = {Work.BURN_IN: 0.3, Work.MUTUAL: 0.7, Work.EVALUATION: 6.0}
# 2 images per iteration of burn-in, 2 + 3 * 4/3 in mutual learning, 30 test images.
AMOUNT = {Work.BURN_IN: 2.0, Work.MUTUAL: 6.0, Work.EVALUATION: 10.0}


def schedule(burn_in=30, max_iter=80, period=30, amount=AMOUNT):
    return Schedule(max_iter, burn_in, period, amount)


def duration(plan, done):
    """Seconds of an iteration with its evaluations."""
    models = plan.evaluated_models(done)
    return SECONDS[plan.step(done)] + models * SECONDS[Work.EVALUATION]


def seconds_left(plan, done):
    return sum(duration(plan, i) for i in range(done + 1, plan.max_iter + 1))


@pytest.mark.parametrize("burn_in", [0, 1, 29, 30, 31, 80])
@pytest.mark.parametrize("period", [0, 1, 7, 30, 80, 100])
@pytest.mark.parametrize("test_images", [0, 10])
def test_remaining_work_is_that_of_the_single_iterations(burn_in, period, test_images):
    plan = schedule(burn_in, 80, period, AMOUNT | {Work.EVALUATION: test_images})
    for done in range(81):
        rest = range(done + 1, 81)
        expected = {
            Work.BURN_IN: sum(plan.step(i) is Work.BURN_IN for i in rest),
            Work.MUTUAL: sum(plan.step(i) is Work.MUTUAL for i in rest),
            Work.EVALUATION: sum(plan.evaluated_models(i) for i in rest),
        }
        assert plan.remaining(done) == {work: n for work, n in expected.items() if n}


def test_models_are_evaluated_once_in_burn_in_and_at_the_end():
    plan = schedule()
    evaluated = {done: n for done in range(1, 81) if (n := plan.evaluated_models(done))}
    assert evaluated == {30: 1, 60: 2, 80: 2}


def test_schedule_of_a_config():
    settings = {
        "SOLVER.MAX_ITER": 80,
        "SEMI.BURN_IN_ITERS": 90,
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.IMS_PER_BATCH_UNLABELED": 3,
        "TEST.EVAL_PERIOD": 30,
    }
    assert Schedule.from_config(tiny_config(settings), test_images=30) == schedule(burn_in=80)


def test_estimate_is_exact_once_everything_is_measured():
    plan = schedule()
    remaining = RemainingTime(plan)
    for done in range(1, 81):
        remaining.add(done, duration(plan, done))
        if done > 30:
            estimate = remaining.estimate(done)
            assert estimate.is_measured
            assert estimate.seconds == pytest.approx(seconds_left(plan, done))
    assert remaining.estimate(80) == Estimate(0, True)


def test_unmeasured_work_is_estimated_from_its_amount():
    remaining = RemainingTime(schedule())
    remaining.add(1, 0.2)  # 0.1 s per image
    # 29 iterations of burn-in, 50 of mutual learning, 5 evaluations of a model
    assert remaining.estimate(1) == Estimate(pytest.approx(29 * 0.2 + 50 * 0.6 + 5 * 1.0), False)
    remaining.add(30, 0.2 + 4.0)
    # The evaluations are measured now, mutual learning is not.
    assert remaining.estimate(30) == Estimate(pytest.approx(50 * 0.6 + 4 * 4.0), False)
    remaining.add(31, 0.5)
    assert remaining.estimate(31) == Estimate(pytest.approx(49 * 0.5 + 4 * 4.0), True)


def test_run_resumed_after_burn_in_needs_no_burn_in():
    plan = schedule()
    remaining = RemainingTime(plan)
    assert remaining.estimate(40) is None and remaining.seconds_per_step(40) is None
    for done in range(42, 61):
        remaining.add(done, duration(plan, done))
    assert remaining.estimate(60).seconds == pytest.approx(seconds_left(plan, 60))
    assert remaining.seconds_per_step(60) == pytest.approx(0.7)


def test_speed_is_that_of_recent_iterations():
    remaining = RemainingTime(schedule(0, 10_000, 0, AMOUNT | {Work.EVALUATION: 0}))
    for done in range(1, 1001):
        remaining.add(done, 5.0 if done <= 500 else 1.0)
    assert remaining.estimate(1000) == Estimate(9000, True)


def test_evaluation_in_the_first_measured_iteration_is_not_counted_as_a_step():
    remaining = RemainingTime(schedule(period=1))
    remaining.add(2, 9.0)
    assert remaining.estimate(2) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (5.4, "0:05"), (65, "1:05"), (605, "10:05"), (3605, "1:00:05")],
)
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text


def test_estimate_says_whether_it_is_measured():
    assert str(Estimate(65, True)) == "1:05 left"
    assert str(Estimate(65, False)) == "about 1:05 left"
