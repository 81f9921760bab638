"""Summary of a run: the rows and the table."""

import json
import math

import pytest
import yaml

import summarize
from locreweight.engine.run_folder import open_run, open_runs, summary_table


def write_run(folder, burn_in, end, evaluations, test_set="coco:a:b"):
    folder.mkdir(parents=True)
    config = {
        "SEMI": {"BURN_IN_ITERS": burn_in},
        "SOLVER": {"MAX_ITER": end},
        "DATASETS": {"TEST": [test_set]},
    }
    (folder / "config.yaml").write_text(yaml.dump(config))
    lines = [{"iteration": 5, "total_loss": 1.0}]
    for iteration, teacher, student in evaluations:
        lines.append(
            {"iteration": iteration}
            | {f"bbox/{m}": teacher for m in ("AP", "AP50", "AP75")}
            | {f"student/bbox/{m}": student for m in ("AP", "AP50", "AP75")}
        )
    (folder / "metrics.json").write_text("\n".join(json.dumps(line) for line in lines))
    return folder


def test_summary_has_the_teacher_after_burn_in_and_both_final_models(tmp_path):
    run = write_run(tmp_path / "a", 20, 60, [(19, 1.0, 1.0), (39, 2.0, 3.0), (60, 5.0, 4.0)])
    rows = [(r.model, r.iteration, r.values[0]) for r in open_run(run).summary()]
    assert rows == [
        ("teacher, end of burn-in", 20, 1.0),
        ("final student", 60, 4.0),
        ("final teacher", 60, 5.0),
    ]


def test_summary_of_a_supervised_run_has_one_row(tmp_path):
    run = write_run(tmp_path / "a", 100, 60, [(39, 2.0, 2.0), (60, 5.0, 5.0)])
    assert [(r.model, r.values) for r in open_run(run).summary()] == [
        ("supervised", pytest.approx((5.0, 5.0, 5.0, math.nan, math.nan), nan_ok=True))
    ]


@pytest.mark.parametrize(
    ("iteration", "model"), [(9, "during burn-in"), (19, "teacher, end of burn-in")]
)
def test_summary_of_a_run_in_burn_in_has_one_row(tmp_path, iteration, model):
    run = write_run(tmp_path / "a", 20, 60, [(iteration, 2.0, 2.0)])
    assert [(r.model, r.iteration) for r in open_run(run).summary()] == [(model, iteration + 1)]


def test_summary_without_evaluation_is_empty(tmp_path):
    assert open_run(write_run(tmp_path / "a", 20, 60, [])).summary() == []


def test_summary_table_is_markdown(tmp_path):
    run = write_run(tmp_path / "mine", 20, 60, [(19, 1.0, 1.0), (60, 5.125, 4.0)])
    lines = summary_table([open_run(run)]).splitlines()
    assert len(lines) == 2 + 3
    assert "mine" in lines[-1] and "5.12" in lines[-1] and lines[0].startswith("|")


def test_summary_shows_the_best_f1_and_its_threshold(tmp_path):
    run = write_run(tmp_path / "mine", 0, 60, [(60, 5.0, 4.0)])
    record = json.loads((run / "metrics.json").read_text().splitlines()[-1])
    record |= {"bbox/F1": 71.25, "bbox/F1-threshold": 0.6349}
    (run / "metrics.json").write_text(json.dumps(record))
    student, teacher = summary_table([open_run(run)]).splitlines()[-2:]
    assert teacher.split()[-5:] == ["|", "71.25", "|", "0.63", "|"]
    assert student.split()[-2:] == ["|", "|"]


def test_columns_without_values_are_left_out(tmp_path):
    run = write_run(tmp_path / "mine", 0, 60, [(60, 5.0, 4.0)])
    headers = summary_table([open_run(run)]).splitlines()[0].replace("|", " ").split()
    assert headers == ["run", "model", "iterations", "AP", "AP50", "AP75"]


def test_summary_of_several_test_sets_is_that_of_the_first(tmp_path):
    run = write_run(tmp_path / "mine", 0, 60, [])
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["DATASETS"]["TEST"] = ["coco:a:b", "coco:c:d"]
    (run / "config.yaml").write_text(yaml.dump(config))
    names = [f"{model}{name}" for model in ("", "student/") for name in config["DATASETS"]["TEST"]]
    record = {f"{name}/bbox/AP": ap for name, ap in zip(names, (5.0, 9.0, 4.0, 8.0), strict=True)}
    (run / "metrics.json").write_text(json.dumps({"iteration": 59} | record))
    assert [row.values[0] for row in open_run(run).summary()] == [4.0, 5.0]
    assert open_run(run).curve("student/bbox/AP").values == [4.0]


def test_folder_of_a_comparison_stands_for_its_runs(tmp_path, call):
    for method, values in {"a": (10.0, 20.0, 30.0), "b": (5.0, 6.0, 7.0)}.items():
        for seed, value in enumerate(values, 1):
            write_run(tmp_path / method / f"seed-{seed}", 0, 60, [(60, value, value)])
    (tmp_path / "a" / "seed-4").mkdir()  # not started yet
    names = [run.name for run in open_runs([tmp_path])]
    assert names == [f"{method}/seed-{seed}" for method in "ab" for seed in (1, 2, 3)]
    code, printed = call(summarize, tmp_path)
    assert code == 0 and not printed.err
    means, single = printed.out.split("\n\n")
    assert [line for line in means.splitlines() if "a, 3 seeds" in line and "20.00 ± 10.00" in line]
    assert len(single.splitlines()) == 2 + 2 * 6


def test_seeds_are_sorted_as_numbers(tmp_path):
    for seed in (10, 9, 1):
        write_run(tmp_path / "a" / f"seed-{seed}", 0, 60, [])
    assert [run.path.name for run in open_runs([tmp_path])] == ["seed-1", "seed-9", "seed-10"]


def test_different_test_sets_are_a_warning(tmp_path, call):
    first = write_run(tmp_path / "a", 0, 60, [(60, 5.0, 5.0)])
    second = write_run(tmp_path / "b", 0, 60, [(60, 5.0, 5.0)], test_set="coco:c:d")
    code, printed = call(summarize, first, second)
    assert code == 0 and "different test sets" in printed.err and "coco:c:d" in printed.err
    assert "warning" not in call(summarize, first, first)[1].err


def test_summarize_without_evaluations_says_so(tmp_path, call):
    code, printed = call(summarize, write_run(tmp_path / "a", 20, 60, []))
    assert code == 0 and "nothing has been evaluated yet" in printed.out


def test_summarize_folder_that_is_not_a_run_is_an_error(call, tmp_path):
    code, _ = call(summarize, tmp_path)
    assert "is not the OUTPUT_DIR of a run: no config.yaml" in code
