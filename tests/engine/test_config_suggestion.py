"""The schedule that is suggested for the user's data and settings."""

import pytest

from locreweight.config import load_config
from locreweight.config_checks import check_schedule
from locreweight.engine.config_suggestion import suggest_schedule

BATCH = {"SOLVER.IMS_PER_BATCH": 4, "SOLVER.IMS_PER_BATCH_UNLABELED": 4}
BASE = BATCH | {"SOLVER.WARMUP_ITERS": 1000, "SEMI.EMA_KEEP_RATE": 0.9996}


def suggest(labeled, unlabeled, given):
    """The suggested schedule with the user's keys, as they are written to the config."""
    schedule = suggest_schedule(labeled, unlabeled, BASE | given, given) | given
    options = [str(word) for pair in schedule.items() for word in pair]
    check_schedule(load_config("", options))
    return schedule


@pytest.mark.parametrize(
    ("given", "burn_in", "iterations", "steps", "period"),
    [
        ({}, 300, 900, [], 90),
        ({"SOLVER.MAX_ITER": 200}, 66, 200, [], 20),
        ({"SOLVER.MAX_ITER": 600}, 200, 600, [], 60),
        ({"SOLVER.MAX_ITER": 10_000}, 300, 10_000, [], 1000),
        ({"SOLVER.MAX_ITER": 90_000}, 300, 90_000, [60_000, 80_000], 9000),
        ({"SOLVER.MAX_ITER": 2}, 0, 2, [], 1),
        ({"SOLVER.MAX_ITER": 1}, 0, 1, [], 1),
        ({"SEMI.BURN_IN_ITERS": 1000}, 1000, 1600, [], 160),
        ({"SEMI.BURN_IN_ITERS": 0}, 0, 600, [], 60),
        ({"SEMI.BURN_IN_ITERS": 20, "SOLVER.MAX_ITER": 90}, 20, 90, [], 9),
        ({"SEMI.BURN_IN_ITERS": 90, "SOLVER.MAX_ITER": 90}, 90, 90, [], 9),
        ({"SOLVER.MAX_ITER": 200, "TEST.EVAL_PERIOD": 50}, 66, 200, [], 50),
    ],
)
def test_few_images(given, burn_in, iterations, steps, period):
    schedule = suggest(5, 4, given)
    assert (schedule["SEMI.BURN_IN_ITERS"], schedule["SOLVER.MAX_ITER"]) == (burn_in, iterations)
    assert schedule["SOLVER.STEPS"] == steps
    assert schedule["TEST.EVAL_PERIOD"] == period


@pytest.mark.parametrize(
    ("batch", "burn_in", "iterations"), [((4, 4), 1250, 8750), ((8, 2), 625, 15_625)]
)
def test_number_of_iterations_follows_from_images_and_batch_sizes(batch, burn_in, iterations):
    schedule = suggest(100, 1000, dict(zip(BATCH, batch, strict=True)))
    assert (schedule["SEMI.BURN_IN_ITERS"], schedule["SOLVER.MAX_ITER"]) == (burn_in, iterations)


@pytest.mark.parametrize(
    ("unlabeled", "given", "warmup", "keep_rate"),
    [
        (185, {}, 100, 0.99),
        (1000, {}, 100, 0.999),
        (3000, {}, 100, 0.9996),
        (1000, {"SEMI.EMA_KEEP_RATE": 0.9}, 100, 0.9),
        (1000, {"SEMI.EMA_KEEP_RATE": 0.9999, "SOLVER.WARMUP_ITERS": 500}, 500, 0.9999),
        (1000, {"SEMI.BURN_IN_ITERS": 9000}, 1000, 0.999),
        (1000, {"SEMI.BURN_IN_ITERS": 0, "SOLVER.MAX_ITER": 900}, 300, 0.99),
        (1000, {"SEMI.BURN_IN_ITERS": 10**9, "SOLVER.MAX_ITER": 900}, 300, 0.99),
    ],
)
def test_warmup_and_keep_rate_fit_the_number_of_iterations(unlabeled, given, warmup, keep_rate):
    schedule = suggest(20, unlabeled, given)
    assert schedule["SOLVER.WARMUP_ITERS"] == warmup
    assert schedule["SEMI.EMA_KEEP_RATE"] == keep_rate
