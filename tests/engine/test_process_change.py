"""Resuming with another number of processes."""

import json
from dataclasses import replace

import pytest
import torch

from locreweight.engine.process_change import ProcessChange
from tests.engine.tiny_training import build_trainer, recorded_training, same, training_config

SHRINK = ProcessChange(before=2, now=1, done_before=7, burn_in_before=3, burn_in=6, max_iter=100)
GROW = ProcessChange(before=1, now=2, done_before=14, burn_in_before=6, burn_in=3, max_iter=100)


@pytest.mark.parametrize("done", range(20))
def test_half_as_many_processes_need_twice_as_many_iterations(done):
    assert SHRINK.done(done) == 2 * done
    assert GROW.done(2 * done) == done
    assert SHRINK.index(done - 1) == 2 * done - 1


@pytest.mark.parametrize(("before", "now"), [(8, 1), (1, 8), (3, 2), (2, 3), (8, 6)])
@pytest.mark.parametrize("burn_in_at_one", [0, 1, 1000, 2003])
def test_no_image_is_left_out_and_less_than_a_batch_is_repeated(before, now, burn_in_at_one):
    """Also where the lengths of burn-in are rounded."""
    burn_in_before, burn_in = round(burn_in_at_one / before), round(burn_in_at_one / now)
    change = ProcessChange(before, now, 0, burn_in_before, burn_in, 1_000_000)
    assert change.done(burn_in_before) == burn_in
    previous = 0
    for done in range(burn_in_before + 50):
        converted = change.done(done)
        assert (done >= burn_in_before) <= (converted >= burn_in) and converted >= previous
        previous = converted
        if done >= burn_in_before:
            unlabeled = (done - burn_in_before) * before
            assert 0 <= unlabeled - (converted - burn_in) * now < now


def test_the_end_of_training_stays_the_end():
    # Burn-in is 1333 iterations on three processes, and 4000 on one.
    change = ProcessChange(3, 1, 120_000, 1333, 4000, 360_000)
    assert change.done(120_000) == 360_000
    # Supervised: burn-in never ends. 360000 iterations on one process are 51429 on seven.
    change = ProcessChange(7, 1, 51_429, 10**9, 10**9, 360_000)
    assert change.done(51_429) == 360_000


def test_cut_lines_are_left_out(tmp_path):
    file = tmp_path / "metrics.json"
    file.write_text('{"iteration": 0}\n{"itera\n{"iteration": 1}\n')
    SHRINK.convert_lines(file)
    assert [json.loads(x)["iteration"] for x in file.read_text().splitlines()] == [1, 3]


def cfg_of(burn_in, reference=1, max_iter=4):
    settings = {
        "SEMI.BURN_IN_ITERS": burn_in,
        "SOLVER.REFERENCE_WORLD_SIZE": reference,
        "SOLVER.MAX_ITER": max_iter,
    }
    return training_config({}, "output", settings)


STATE = {
    "iteration": 6,
    "burn_in": 3,
    "processes": 2,
    "finished": {"lr_schedule": 6, "preemption_checkpoint": 6, "evaluation": 5, "metrics": -1},
    "hooks": {
        "lr_schedule": {"last_epoch": 7, "base_lrs": [0.02, 0.04]},
        "best_model": {"best_metric": 3.0, "best_iter": 4},
        "early_stopping": {"improved_at": 5},
        "metrics": {"written": 3, "history": {"loss": (True, [(0.5, 2), (0.4, 3)])}},
        "other": {"iteration": 6},
    },
    "optimizer": "kept",
}


def test_state_is_converted():
    change = ProcessChange.between(STATE, cfg_of(6, max_iter=100), 1)
    assert change == SHRINK
    before = json.dumps(STATE)
    state = change.convert_state(STATE)
    assert json.dumps(STATE) == before
    assert state["iteration"] == 13 and state["burn_in"] == 6 and state["optimizer"] == "kept"
    # Hooks that are behind run again; it does not matter by how much.
    assert state["finished"] == {
        "lr_schedule": 13,
        "preemption_checkpoint": 13,
        "evaluation": 12,
        "metrics": 12,
    }
    assert state["hooks"] == {
        "lr_schedule": {"last_epoch": 14, "base_lrs": [0.01, 0.02]},
        "best_model": {"best_metric": 3.0, "best_iter": 9},
        "early_stopping": {"improved_at": 10},
        "metrics": {"written": 7, "history": {"loss": (True, [(0.5, 5), (0.4, 7)])}},
        "other": {"iteration": 6},
    }


def test_state_before_the_first_evaluation_is_converted():
    hooks = {"best_model": {"best_metric": None, "best_iter": None}}
    state = SHRINK.convert_state(STATE | {"hooks": hooks})
    assert state["hooks"] == hooks


@pytest.mark.parametrize(
    ("state", "processes", "reference"),
    [
        (STATE, 2, 1),
        (STATE, 1, 0),  # nothing is scaled
        ({"iteration": 6, "burn_in": 3}, 1, 1),  # of an earlier version
    ],
)
def test_nothing_is_converted_without_a_change(state, processes, reference):
    assert ProcessChange.between(state, cfg_of(6, reference), processes) is None


def test_burn_in_that_was_also_changed_is_converted_as_it_was():
    assert ProcessChange.between(STATE, cfg_of(50), 1).burn_in == 6


def test_lines_are_converted_and_later_ones_removed(tmp_path):
    file = tmp_path / "metrics.json"
    lines = [{"iteration": i, "loss": i / 3} for i in (0, 3, 6, 7, 8)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"iter')
    SHRINK.convert_lines(file)
    converted = [json.loads(line) for line in file.read_text().splitlines()]
    assert converted == [{"iteration": i, "loss": j / 3} for i, j in ((1, 0), (7, 3), (13, 6))]
    SHRINK.convert_lines(tmp_path / "missing.json")


def test_description_names_what_changes():
    cfg = training_config(
        {},
        "output",
        {
            "SOLVER.IMS_PER_BATCH": 2,
            "SOLVER.IMS_PER_BATCH_UNLABELED": 8,
            "SOLVER.BASE_LR": 0.005,
            "SOLVER.MAX_ITER": 40,
        },
    )
    assert replace(SHRINK, done_before=8).describe(cfg) == (
        "resumed with 1 process(es) instead of 2: 2 labeled + 8 unlabeled images per iteration "
        "instead of 4 + 16, learning rate 0.005 instead of 0.01, 16 of 40 iterations done instead "
        "of 8 of 20"
    )


ONE = {
    "SOLVER.REFERENCE_WORLD_SIZE": 1,
    "SOLVER.MAX_ITER": 12,
    "SOLVER.STEPS": (10,),
    "SOLVER.WARMUP_ITERS": 4,
    "SOLVER.CHECKPOINT_PERIOD": 6,
    "SEMI.BURN_IN_ITERS": 4,
    "SOLVER.BASE_LR": 0.0005,
}
# What these settings are in two processes.
TWO = {
    "SOLVER.REFERENCE_WORLD_SIZE": 1,
    "SOLVER.MAX_ITER": 6,
    "SOLVER.STEPS": (5,),
    "SOLVER.WARMUP_ITERS": 2,
    "SOLVER.CHECKPOINT_PERIOD": 3,
    "SEMI.BURN_IN_ITERS": 2,
    "SOLVER.BASE_LR": 0.001,
    "SOLVER.IMS_PER_BATCH": 4,
    "SOLVER.IMS_PER_BATCH_UNLABELED": 4,
}


@pytest.mark.parametrize(
    ("first", "second", "processes", "file", "start"),
    [(TWO, ONE, (2, 1), "model_0000002.pth", 6), (ONE, TWO, (1, 2), "model_0000005.pth", 3)],
)
def test_run_continues_at_the_same_images_and_learning_rate(
    datasets, tmp_path, caplog, monkeypatch, first, second, processes, file, start
):
    """One process plays one and two."""
    build_trainer(training_config(datasets, tmp_path / "first", first)).train()
    folder = tmp_path / "resumed"
    folder.mkdir()
    content = torch.load(tmp_path / "first" / file, weights_only=True)
    assert content["trainer"]["processes"] == 1
    content["trainer"]["processes"], now = processes
    torch.save(content, folder / file)
    (folder / "last_checkpoint").write_text(file)

    whole = recorded_training(build_trainer(training_config(datasets, tmp_path / "whole", second)))
    caplog.set_level("INFO", logger="locreweight")
    between = ProcessChange.between
    monkeypatch.setattr(ProcessChange, "between", lambda state, cfg, _: between(state, cfg, now))
    resumed = build_trainer(training_config(datasets, folder, second), resume=True)
    assert resumed.start_iter == start and same(resumed.student.state_dict(), content["student"])
    assert f"resumed with {now} process(es) instead of {processes[0]}: " in caplog.text
    # The next start finds a checkpoint in the iterations of now.
    saved = torch.load(folder / "model_resume.pth", weights_only=True)
    assert saved["trainer"]["iteration"] == start - 1

    record = recorded_training(resumed)
    assert record.images == whole.images[start:]
    assert record.rates == pytest.approx(whole.rates[start:], rel=1e-12)
