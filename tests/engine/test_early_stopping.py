"""Early stopping when the teacher does not become better."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from locreweight.config_checks import check_supported
from locreweight.engine.hooks import EarlyStopping
from locreweight.engine.run_folder import read_metrics
from locreweight.errors import UsageError
from tests.engine.tiny_training import recorded_training
from tests.modeling.tiny_model import tiny_config


def evaluations_until_end(aps, patience, burn_in=0):
    """Number of evaluations, every 10 iterations, before training ends."""
    best = SimpleNamespace(best_iter=None)
    hook = EarlyStopping(best, patience=patience, eval_period=10, burn_in=burn_in)
    highest = -1.0
    for done in range(1, 10 * len(aps) + 1):
        hook.trainer = SimpleNamespace(iter=done - 1)
        if done % 10 == 0 and (ap := aps[done // 10 - 1]) > highest:
            highest, best.best_iter = ap, done - 1
        hook.after_step()
        if hook.is_due(done):
            return done // 10
    return None


@pytest.mark.parametrize(
    ("aps", "patience", "burn_in", "expected"),
    [
        ([1, 2, 3, 2, 3, 4, 4, 4], 2, 0, 5),  # the same AP is not better
        ([1, 2, 3, 2, 3, 4, 4, 4], 3, 0, None),
        ([3, 2, 1], 1, 0, 2),
        ([3, 2, 1], 0, 0, None),
        ([3, 2, 1, 1, 1, 1, 1], 2, 30, 5),  # burn-in ends after the third evaluation
        ([float("nan")] * 4, 3, 0, 3),  # no detections
    ],
)
def test_training_ends_after_evaluations_without_improvement(aps, patience, burn_in, expected):
    assert evaluations_until_end(aps, patience, burn_in) == expected


@pytest.fixture
def make_run(make_trainer, datasets, monkeypatch):
    """Builds trainers whose evaluations give fixed APs, one per iteration."""
    settings = {
        "DATASETS.TEST": datasets["DATASETS.TEST"],
        "TEST.EVAL_PERIOD": 1,
        "SEMI.BURN_IN_ITERS": 1,
        "SOLVER.MAX_ITER": 9,
        "SOLVER.EARLY_STOPPING_PATIENCE": 2,
    }
    aps = [5.0, 1.0, 6.0, 7.0, 7.0, 6.0, 9.0, 9.0, 9.0]

    def make(**how):
        trainer = make_trainer(settings | how.pop("settings", {}), **how)

        def evaluate(*_, iteration, identical):
            results = {"bbox": {"AP": aps[trainer.iter]}}
            return {**results, "student": results}

        monkeypatch.setattr("locreweight.engine.trainer.evaluate_teacher_and_student", evaluate)
        return trainer

    return make


def test_run_ends_early_with_all_results(make_run, tmp_path, caplog):
    # Burn-in ends after iteration 1, the last improvement is in iteration 4.
    with caplog.at_level(logging.INFO, "locreweight.console"):
        record = recorded_training(make_run(settings={"SOLVER.CHECKPOINT_PERIOD": 4}))
    assert len(record.students) == 6
    assert (tmp_path / "model_final.pth").is_file()
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert record.results["bbox/AP"] == 6.0
    results = [line["bbox/AP"] for line in read_metrics(tmp_path) if "bbox/AP" in line]
    assert results == [5.0, 1.0, 6.0, 7.0, 7.0, 6.0], "evaluations close to each other are recorded"
    last = read_metrics(tmp_path)[-1]
    assert (last["iteration"], last["bbox/AP"]) == (5, 6.0)
    assert "trained iterations 1 to 6 in" in caplog.text and "does not get better" in caplog.text
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("iter ")]
    assert lines[0] == "iter 1: AP 5.0 (best 5.0)"
    assert lines[-1] == "iter 6: teacher AP 6.0, student 6.0 (best 7.0)"

    resumed = make_run(resume=True)
    assert resumed.is_finished
    with caplog.at_level(logging.INFO, "locreweight.console"):
        assert resumed.train() == {}
    assert "ended early, after 6 iterations" in caplog.text

    patient = make_run(resume=True, settings={"SOLVER.EARLY_STOPPING_PATIENCE": 4})
    assert not patient.is_finished
    assert len(recorded_training(patient).students) == 3, "continues to SOLVER.MAX_ITER"


def test_run_stopped_before_its_final_checkpoint_ends_when_it_is_resumed(make_run, tmp_path):
    recorded_training(make_run(settings={"SOLVER.CHECKPOINT_PERIOD": 6}))
    Path(tmp_path, "model_final.pth").unlink()
    (tmp_path / "last_checkpoint").write_text("model_0000005.pth")
    resumed = make_run(resume=True)
    assert not resumed.is_finished
    assert recorded_training(resumed).students == []
    assert (tmp_path / "model_final.pth").is_file()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"SOLVER.EARLY_STOPPING_PATIENCE": -1}, "is -1; it must be at least 0"),
        ({"SOLVER.EARLY_STOPPING_PATIENCE": 2, "DATASETS.TEST": ()}, "set DATASETS.TEST"),
        ({"SOLVER.EARLY_STOPPING_PATIENCE": 2, "TEST.EVAL_PERIOD": 0}, "TEST.EVAL_PERIOD"),
    ],
)
def test_early_stopping_needs_evaluations(settings, message):
    evaluated = {"DATASETS.TEST": ("test",), "TEST.EVAL_PERIOD": 5}
    with pytest.raises(UsageError, match=message):
        check_supported(tiny_config(evaluated | settings))
