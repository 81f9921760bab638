"""tools/quickstart.py: the baseline, and the second call."""

import json
import sys

import pytest

import quickstart
from locreweight.config import load_config
from tests.engine.tiny_training import (
    build_trainer,
    make_datasets,
    recorded_training,
    same,
    training_config,
)

MAX_ITER = 4
LABELED_ONLY = {"SEMI.BURN_IN_ITERS": MAX_ITER}


def test_shared_burn_in_gives_the_model_of_a_whole_supervised_training(tmp_path):
    data = make_datasets(tmp_path / "data")

    def record_of(folder, settings, **how):
        settings = {"SOLVER.MAX_ITER": MAX_ITER, "SOLVER.CHECKPOINT_PERIOD": 2, **settings}
        trainer = build_trainer(training_config(data, tmp_path / folder, settings), **how)
        return recorded_training(trainer)

    record_of("main", {"SEMI.BURN_IN_ITERS": 2})
    whole = record_of("whole", LABELED_ONLY)
    quickstart.share_burn_in(tmp_path / "main", tmp_path / "shared", burn_in=2)
    shared = record_of("shared", LABELED_ONLY, resume=True)
    assert len(shared.students) == MAX_ITER - 2
    assert same(shared.students[-1], whole.students[-1])
    lines = (tmp_path / "shared/metrics.json").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == sorted(
        {json.loads(line)["iteration"] for line in lines}
    ), "metrics of the other run's mutual learning are removed"


@pytest.mark.parametrize("exists", ["nothing", "baseline"])
def test_burn_in_is_not_shared(tmp_path, exists):
    source, target = tmp_path / "main", tmp_path / "baseline"
    source.mkdir()
    if exists == "baseline":  # it resumes from its own checkpoint
        target.mkdir()
        (target / "last_checkpoint").write_text("model_0000003.pth")
        (source / "model_0000001.pth").touch()
        (source / "metrics.json").touch()
    quickstart.share_burn_in(source, target, burn_in=2)
    assert not (target / "model_0000001.pth").exists()


def quickstart_config(*options):
    return load_config(quickstart.CONFIG, [*quickstart.SETTINGS, *options])


def write_run(folder, aps, burn_in, options=()):
    folder.mkdir(parents=True)
    cfg = quickstart_config("SEMI.BURN_IN_ITERS", str(burn_in), *options)
    (folder / "config.yaml").write_text(cfg.dump())
    names = ["bbox/AP", "bbox/AP50", "bbox/AP75"]
    lines = [
        {"iteration": done - 1} | {f"{s}{n}": ap for s in ("", "student/") for n in names}
        for done, ap in aps.items()
    ]
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "model_final.pth").touch()


def test_second_call_shows_the_results_in_a_few_lines(tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    monkeypatch.chdir(quickstart.ROOT)
    write_run(output, {300: 26.0, 700: 40.0}, burn_in=300)
    write_run(tmp_path / "out-labeled-only", {700: 33.0}, burn_in=700)
    (output / "report.html").touch()
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "OUTPUT_DIR", str(output)])
    monkeypatch.setattr(quickstart, "run_script", lambda *_: pytest.fail("trained again"))
    quickstart.main()
    printed = capsys.readouterr().out
    assert f"has finished before. To repeat it, remove {output} and" in printed
    assert "| labeled images only     |          700 | 33.00 |" in printed
    assert "| final teacher           |          700 | 40.00 |" in printed
    assert str(output / "report.html") in printed
    assert len(printed.splitlines()) < 20


def test_both_trainings_use_the_method(tmp_path, monkeypatch):
    commands = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart.os, "chdir", lambda folder: None)
    monkeypatch.setattr(quickstart, "CONFIG", str(quickstart.ROOT / quickstart.CONFIG))
    monkeypatch.setattr(quickstart, "run_script", lambda *_: None)

    def train_both(*arguments):
        commands.extend(arguments)
        sys.exit()

    monkeypatch.setattr(quickstart, "train_both", train_both)
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--method", "mixpl"])
    with pytest.raises(SystemExit):
        quickstart.main()
    for command in commands[:2]:
        assert command[command.index("--method") + 1] == "mixpl"
    assert [folder.name for folder in commands[2:4]] == [
        "quickstart-mixpl",
        "quickstart-mixpl-labeled-only",
    ]


def test_longer_run_is_not_finished(tmp_path):
    write_run(tmp_path / "out", {700: 40.0}, burn_in=300)
    cfg = quickstart_config("SOLVER.MAX_ITER", "900")
    assert not quickstart.is_finished(tmp_path / "out", cfg)
    assert quickstart.is_finished(tmp_path / "out", quickstart_config())


PATIENT = ["SOLVER.EARLY_STOPPING_PATIENCE", "1", "TEST.EVAL_PERIOD", "100"]


def test_second_call_after_early_stopping_does_not_train(tmp_path, monkeypatch, capsys):
    output, baseline = tmp_path / "out", tmp_path / "out-labeled-only"
    monkeypatch.chdir(quickstart.ROOT)
    write_run(output, {300: 26.0, 400: 40.0, 500: 40.0}, burn_in=300, options=PATIENT)
    write_run(baseline, {100: 33.0, 200: 31.0}, burn_in=700, options=PATIENT)
    (output / "report.html").touch()
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "OUTPUT_DIR", str(output), *PATIENT])
    monkeypatch.setattr(quickstart, "run_script", lambda *_: pytest.fail("trained again"))
    quickstart.main()
    printed = capsys.readouterr().out
    assert "| labeled images only     |          200 | 31.00 |" in printed
    assert "| final teacher           |          500 | 40.00 |" in printed


@pytest.mark.parametrize(
    ("aps", "options"),
    [
        ({300: 26.0, 400: 40.0}, PATIENT),  # the last one is the best
        ({300: 26.0, 400: 20.0}, [*PATIENT[:1], "2", *PATIENT[2:]]),
        ({300: 26.0, 400: 20.0}, PATIENT[2:]),
    ],
)
def test_interrupted_run_with_early_stopping_is_not_finished(tmp_path, aps, options):
    write_run(tmp_path / "out", aps, burn_in=300, options=options)
    cfg = quickstart_config(*options)
    assert not quickstart.is_finished(tmp_path / "out", cfg)


def test_other_patience_is_not_finished(tmp_path):
    write_run(tmp_path / "out", {300: 26.0, 400: 20.0}, burn_in=300, options=PATIENT)
    assert quickstart.is_finished(tmp_path / "out", quickstart_config(*PATIENT))
    assert not quickstart.is_finished(tmp_path / "out", quickstart_config())


def script(code):
    return ["-c", f"import pathlib, sys, time\n{code}"]


def end_of_burn_in(output):
    return (
        f"folder = pathlib.Path({str(output)!r})\n"
        "folder.mkdir()\n"
        "(folder / 'metrics.json').touch()\n"
        "(folder / 'model_0000001.pth').touch()\n"
    )


def test_baseline_trains_at_the_same_time_from_the_end_of_burn_in(tmp_path):
    output, baseline = tmp_path / "main", tmp_path / "baseline"
    started = f"pathlib.Path({str(tmp_path / 'started')!r})"
    main_run = script(
        f"{end_of_burn_in(output)}while not {started}.exists():\n    time.sleep(0.01)"
    )
    baseline_run = script(
        f"assert pathlib.Path({str(baseline)!r}, 'model_0000001.pth').exists()\n"
        f"print('console')\n{started}.touch()"
    )
    quickstart.train_both(main_run, baseline_run, output, baseline, burn_in=2)
    assert (baseline / "console.txt").read_text() == "console\n"


def test_failed_training_starts_no_baseline(tmp_path):
    output, baseline = tmp_path / "main", tmp_path / "baseline"
    with pytest.raises(SystemExit) as error:
        quickstart.train_both(script("sys.exit(7)"), script(""), output, baseline, burn_in=2)
    assert error.value.code == 7
    assert not baseline.exists()


def test_training_that_fails_after_burn_in_stops_the_baseline(tmp_path):
    output, baseline = tmp_path / "main", tmp_path / "baseline"
    main_run = script(f"{end_of_burn_in(output)}time.sleep(1.5)\nsys.exit(7)")
    with pytest.raises(SystemExit) as error:
        quickstart.train_both(main_run, script("time.sleep(60)"), output, baseline, burn_in=2)
    assert error.value.code == 7


@pytest.mark.parametrize("rest", ["", "time.sleep(60)\n"], ids=["ended", "training"])
def test_failed_baseline_ends_both_and_names_its_output(tmp_path, capsys, rest):
    output, baseline = tmp_path / "main", tmp_path / "baseline"
    last = f"{rest}(folder / 'last').touch()"
    failing = script("print('reason', file=sys.stderr)\nsys.exit(3)")
    with pytest.raises(SystemExit) as error:
        quickstart.train_both(
            script(end_of_burn_in(output) + last), failing, output, baseline, burn_in=2
        )
    assert error.value.code == 3
    assert (output / "last").exists() == (not rest)
    assert str(baseline / "console.txt") in capsys.readouterr().out
    assert "reason" in (baseline / "console.txt").read_text()
