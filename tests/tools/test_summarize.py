"""Summary of a run: the rows and the table."""

import json

import yaml

import summarize
from locreweight.engine.run_folder import open_run, summary_table


def write_run(folder, burn_in, end, evaluations):
    folder.mkdir()
    config = {"SEMI": {"BURN_IN_ITERS": burn_in}, "SOLVER": {"MAX_ITER": end}}
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
        ("supervised", (5.0, 5.0, 5.0))
    ]


def test_summary_without_evaluation_is_empty(tmp_path):
    assert open_run(write_run(tmp_path / "a", 20, 60, [])).summary() == []


def test_summary_table_is_markdown(tmp_path):
    run = write_run(tmp_path / "mine", 20, 60, [(19, 1.0, 1.0), (60, 5.125, 4.0)])
    lines = summary_table([open_run(run)]).splitlines()
    assert len(lines) == 2 + 3
    assert "mine" in lines[-1] and "5.12" in lines[-1] and lines[0].startswith("|")


def test_summarize_folder_that_is_not_a_run_is_an_error(call, tmp_path):
    code, _ = call(summarize, tmp_path)
    assert "is not the OUTPUT_DIR of a run: no config.yaml" in code
