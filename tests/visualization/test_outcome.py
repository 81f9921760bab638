"""Sentences on what came out of runs."""

import json

import pytest
import yaml

from locreweight.engine.run_folder import RunGroup, open_run
from locreweight.visualization.outcome import describe_comparison, describe_run


@pytest.fixture
def make_run(tmp_path):
    def make(name, burn_in, evaluations, end=60, test_set="coco:a:b", patience=0):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        config = {
            "SEMI": {"BURN_IN_ITERS": burn_in},
            "SOLVER": {"MAX_ITER": end, "EARLY_STOPPING_PATIENCE": patience},
            "TEST": {"EVAL_PERIOD": 20},
            "DATASETS": {"TEST": [test_set]},
        }
        (folder / "config.yaml").write_text(yaml.dump(config))
        lines = [
            {"iteration": done - 1, "bbox/AP": teacher, "student/bbox/AP": student}
            for done, teacher, student in evaluations
        ]
        (folder / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
        return open_run(folder)

    return make


@pytest.mark.parametrize(
    ("burn_in", "evaluations", "expected"),
    [
        (20, [], ["Nothing has been evaluated yet."]),
        (
            20,
            [(20, 26.0, 26.0)],
            ["After 20 of 60 iterations, on labeled images only", "AP of 26.0"],
        ),
        (99, [(60, 30.0, 30.0)], ["After 60 iterations, on labeled images only, the model"]),
        (0, [(60, 30.0, 28.0)], ["the teacher has an AP of 30.0 and the student 28.0."]),
        (20, [(20, 26.0, 26.0), (60, 40.3, 37.5)], ["40.3", "37.5", "iteration 20", "+14.3"]),
        (20, [(20, 26.0, 26.0), (60, 20.0, 20.0)], ["a change of -6.0"]),
        (0, [(60, float("nan"), 1.0)], ["an AP of 0.0"]),
    ],
)
def test_sentence_on_a_run(make_run, burn_in, evaluations, expected):
    sentence = describe_run(make_run("a", burn_in, evaluations))
    assert all(part in sentence for part in expected)


def group(name, *runs):
    return RunGroup(name, list(runs))


def test_sentence_on_a_comparison(make_run):
    mine = group(
        "mine", make_run("mine/1", 20, [(60, 40.0, 1.0)]), make_run("mine/2", 20, [(60, 42.0, 1.0)])
    )
    base = group("base", make_run("base", 60, [(60, 33.0, 33.0)]))
    weak = group("weak", make_run("weak", 20, [(60, 30.0, 1.0)]))
    sentence = describe_comparison([base, weak, mine])
    assert "mine has the highest final AP, 41.0, and weak the lowest, 30.0." in sentence
    assert "mine has +8.0 AP against base" in sentence and "means over the seeds" in sentence


def test_unfinished_runs_are_not_compared(make_run):
    first = group("a", make_run("a", 20, [(60, 40.0, 1.0)]))
    second = group("b", make_run("b", 20, [(40, 90.0, 1.0)]))
    assert "nothing to compare yet" in describe_comparison([first, second])


def test_run_that_ended_early_is_finished(make_run):
    evaluations = [(20, 20.0, 20.0), (40, 19.0, 18.0)]
    early, other = make_run("a", 20, evaluations, patience=1), make_run("b", 20, [(60, 9.0, 1.0)])
    assert "After 40 of 60 iterations (early stopping), the teacher" in describe_run(early)
    assert "a has the highest final AP, 19.0" in describe_comparison(
        [group("a", early), group("b", other)]
    )


def test_runs_with_different_test_sets_are_not_compared(make_run):
    first = group("a", make_run("a", 20, [(60, 40.0, 1.0)]))
    second = group("b", make_run("b", 20, [(60, 30.0, 1.0)], test_set="coco:c:d"))
    assert "different test sets" in describe_comparison([first, second])
