"""Comparisons: planned runs, processes, results and tables."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import yaml

import compare
from locreweight.engine.comparison import _Progress, last_line, plan_runs, run_all
from locreweight.engine.run_folder import ATTEMPTS_FILE, Attempt, read_attempts
from locreweight.engine.run_queue import CONSOLE_FILE, Run, RunQueue, gpu_slots
from locreweight.engine.run_record import RUN_FILE, RunRecord
from locreweight.errors import UsageError
from locreweight.visualization.comparison_report import (
    as_csv,
    as_markdown,
    draw_curves,
    read_results,
    write_report,
)
from tests.engine.tiny_training import TRAINING, make_datasets
from tests.modeling.tiny_model import TINY, as_options

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "configs/quickstart.yaml"
METHODS = ROOT / "configs/methods"
SHORT = ("SOLVER.MAX_ITER", "40", "SEMI.BURN_IN_ITERS", "20")


def run_of(output, seed=1, method=None, options=SHORT):
    return Run(QUICKSTART, method and METHODS / f"{method}.yaml", seed, Path(output), options)


def write_results(run, aps, *labels):
    """Write the files of a run: AP by completed iterations, and measurements of pseudo-labels."""
    run.output.mkdir(parents=True)
    (run.output / "config.yaml").write_text(run.cfg.dump())
    # Iterations of burn-in, the first 20, are faster.
    lines = [{"iteration": i, "time": 0.1 + i / 100} for i in (0, 1, 2, 30, 31, 32)]
    for done, ap in aps.items():
        scores = {
            "bbox/AP": ap,
            "bbox/AP50": 2 * ap,
            "bbox/AP75": ap / 2,
            "student/bbox/AP": ap - 1,
        }
        lines.append({"iteration": done - 1, "voc_11_point/AP50": 3 * ap, **scores})
    for i, measured in enumerate(labels, 35):
        lines.append({"iteration": i} | {f"pseudo_truth/{k}": v for k, v in measured.items()})
    (run.output / "metrics.json").write_text("".join(json.dumps(x) + "\n" for x in lines))
    if run.cfg.SOLVER.MAX_ITER in aps:
        (run.output / "model_final.pth").touch()
    attempt = Attempt(seconds=3.0, exit_code=0, peak_ram_mib=1000.0)
    (run.output / ATTEMPTS_FILE).write_text(json.dumps([vars(attempt)]))
    write_starts(run, "abc")


def write_starts(run, *commits):
    machine = {"CPU": "CPU", "cores": "2", "GPUs": "none"}
    starts = [RunRecord("python train_net.py", x, "now", 1, machine=machine) for x in commits]
    (run.output / RUN_FILE).write_text(json.dumps([vars(start) for start in starts]))


def plan(*arguments):
    """Plan the runs of a command line."""
    args = compare.parse_arguments([str(part) for part in arguments])
    return plan_runs(
        args.config_file, args.methods, args.seeds, args.output, args.opts, args.num_gpus
    )


# --- planning -------------------------------------------------------------------------------------


def test_plan_combines_configs_methods_and_seeds(tmp_path):
    methods = ["stac", METHODS / "supervised.yaml"]  # a name and a file
    words = ["--config-file", QUICKSTART, ROOT / "configs/bccd-small.yaml", "--methods", *methods]
    runs = plan(*words, "--seeds", 1, 2, "--output", tmp_path)
    assert len(runs) == 8
    assert {run.row for run in runs} == {
        "quickstart + stac",
        "quickstart + supervised",
        "bccd-small + stac",
        "bccd-small + supervised",
    }
    assert runs[0].output == tmp_path / "quickstart-stac/seed-1"
    for run in runs:
        assert run.cfg.OUTPUT_DIR == str(run.output)
        assert (run.cfg.SEED, run.cfg.DATASETS.SPLIT_SEED) == (run.seed, run.seed)
    assert runs[0].cfg.SEMI.METHOD == "STAC"


def test_options_override_the_configs_of_all_runs(tmp_path):
    words = ["--config-file", QUICKSTART, "--output", tmp_path, "SOLVER.MAX_ITER", 40]
    (run,) = plan(*words, "DATASETS.SPLIT_SEED", 7)
    assert (run.cfg.SOLVER.MAX_ITER, run.cfg.DATASETS.SPLIT_SEED, run.cfg.SEED) == (40, 7, 1)


@pytest.mark.parametrize(
    ("method", "key"),
    [
        ("supervised.yaml", "SEMI.BURN_IN_ITERS"),
        ("published/stac-coco.yaml", "SEMI.PSEUDO_LABEL_THRESHOLD"),
        ("published/stac-coco.yaml", "SEMI.EMA_KEEP_RATE"),
    ],
)
def test_option_that_a_method_sets_is_an_error(tmp_path, method, key):
    words = ["--config-file", QUICKSTART, "--methods", METHODS / method, "--output", tmp_path]
    with pytest.raises(UsageError, match=rf"{key} is set by .*{method}"):
        plan(*words, key, 3)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("SEED", 7), "SEED is set by --seeds"),
        (("OUTPUT_DIR", "x"), "OUTPUT_DIR is set by --output"),
        (("SEMI.LER", True), "SEMI.LER differs between the config files"),
        (("SEMI.METHOD", "Mine"), "1-neither, seed 1: unknown SEMI.METHOD 'Mine'"),
        (
            ("INPUT.AUGMENTATION_POLICY", "Mine"),
            "1-neither, seed 1: unknown INPUT.AUGMENTATION_POLICY 'Mine'",
        ),
    ],
)
def test_option_that_distinguishes_runs_is_an_error(tmp_path, option, message):
    configs = sorted((ROOT / "configs/table3").glob("*.yaml"))
    words = ["--config-file", *configs, "--seeds", 1, 2, "--output", tmp_path]
    assert len(plan(*words, "SOLVER.MAX_ITER", 7)) == 8
    with pytest.raises(UsageError, match=message):
        plan(*words, *option)


def test_early_stopping_is_an_error(tmp_path):
    words = ["--config-file", QUICKSTART, "--output", tmp_path]
    with pytest.raises(UsageError, match=r"seed 1 may end early, .*EARLY_STOPPING_PATIENCE 0"):
        plan(*words, "SOLVER.EARLY_STOPPING_PATIENCE", 2)


def test_missing_fold_is_an_error_before_the_first_run(tmp_path):
    split = tmp_path / "splits.json"
    split.write_text(json.dumps({"sets": [{"labeled": {"100.0": {"1": [], "2": []}}}]}))

    def plan_seeds(*seeds):
        words = ["--config-file", QUICKSTART, "--seeds", *seeds, "--output", tmp_path]
        return plan(*words, "DATASETS.SPLIT_FILE", split)

    assert len(plan_seeds(1, 2)) == 2
    with pytest.raises(UsageError, match="quickstart, seed 3: .* no split of seed 3.* 1, 2"):
        plan_seeds(2, 3)


def test_method_that_is_not_a_config_file_is_an_error(tmp_path):
    words = ["--config-file", QUICKSTART, "--output", tmp_path, "--methods", ROOT / "README.md"]
    with pytest.raises(UsageError, match=r"cannot read the config file '.*README\.md'"):
        plan(*words)


@pytest.mark.parametrize("words", [["--num-gpus", 0], ["--parallel", -1]])
def test_counts_below_one_are_an_error(tmp_path, words, capsys):
    with pytest.raises(SystemExit):
        plan("--config-file", QUICKSTART, "--output", tmp_path, *words)
    assert f"{words[0]}: '{words[1]}' is not an integer of at least 1" in capsys.readouterr().err


def test_output_folder_that_cannot_be_created_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    words = ["--config-file", QUICKSTART, "--output", tmp_path / "file/out", "MODEL.DEVICE", "cpu"]
    with pytest.raises(UsageError, match=r"--output: .*file/out"):
        run_all(plan(*words), None, lambda: None)


def test_config_files_with_the_same_name_are_an_error(tmp_path):
    other = tmp_path / "quickstart.yaml"
    other.write_text(yaml.dump({"_BASE_": str(QUICKSTART)}))
    with pytest.raises(UsageError, match="have the same name"):
        plan("--config-file", QUICKSTART, other, "--output", tmp_path)


def test_options_after_the_config_files_are_not_taken_for_config_files(tmp_path):
    with pytest.raises(UsageError, match=r"config file 'SEED' does not exist.* KEY or VALUE"):
        plan("--output", tmp_path, "--config-file", QUICKSTART, "SEED", "192", "KEY", "192")


def test_several_test_sets_are_an_error(tmp_path):
    tests = "['coco:a.json:a', 'coco:b.json:b']"
    words = ["--config-file", QUICKSTART, "--output", tmp_path, "DATASETS.TEST", tests]
    with pytest.raises(UsageError, match=r"2 sets in DATASETS\.TEST"):
        plan(*words)


def test_run_started_with_other_settings_is_not_resumed(tmp_path):
    words = ["--config-file", QUICKSTART, "--output", tmp_path]
    run = run_of(tmp_path / "quickstart/seed-1")
    write_results(run, {20: 1.0})
    assert run.changed_settings() == []
    with pytest.raises(UsageError, match=r"SOLVER\.MAX_ITER was 40, now 41"):
        plan(*words, "SOLVER.MAX_ITER", 41, "SEMI.BURN_IN_ITERS", 20)


def test_run_killed_before_it_wrote_its_config_is_started_again(tmp_path):
    run = run_of(tmp_path / "run")
    run.output.mkdir()
    (run.output / "config.yaml").touch()
    assert run.changed_settings() == [] and read_results(run) is None and not run.is_finished


def test_command_is_that_of_train_net(tmp_path):
    command = run_of(tmp_path, seed=3, method="stac").command
    assert command[1:] == [
        *("--config-file", str(QUICKSTART), "--method", str(METHODS / "stac.yaml"), "--resume"),
        *("--num-gpus", "1", "SEED", "3", "DATASETS.SPLIT_SEED", "3", *SHORT),
        *("OUTPUT_DIR", str(tmp_path)),
    ]


# --- results and tables ---------------------------------------------------------------------------


def test_results_of_a_finished_run(tmp_path):
    run = run_of(tmp_path / "run", seed=2, method="soft_teacher")
    write_results(run, {20: 10.0, 40: 30.0}, {"precision": 0.75, "recall": 0.25})
    results = read_results(run)
    assert (results.row, results.seed, results.finished) == ("quickstart + soft_teacher", 2, True)
    assert (results.ap, results.ap50, results.ap75, results.student_ap) == (30.0, 60.0, 15.0, 29.0)
    assert results.voc_ap50 == 90.0
    assert (results.precision, results.recall) == (0.75, 0.25)
    assert results.seconds_per_iteration == pytest.approx(0.41)  # of 0.40, 0.41, 0.42
    assert (results.peak_memory_mib, results.memory_of) == (1000.0, "RAM")
    assert (results.threshold, results.unsupervised_weight, results.burn_in) == (0.6, 2.0, 20)
    assert (results.commit, results.machine) == ("abc", "2 x CPU")


def test_precision_is_unknown_without_pseudo_labels_at_the_end(tmp_path):
    run = run_of(tmp_path / "run")
    write_results(run, {40: 30.0}, {"precision": 0.75, "recall": 0.25}, {"recall": 0.0})
    results = read_results(run)
    assert (np.isnan(results.precision), results.recall) == (True, 0.0)


def test_row_names_all_commits_of_a_run(tmp_path):
    run = run_of(tmp_path / "run")
    write_results(run, {40: 30.0})
    write_starts(run, "abc", "abc", "def+changes")
    assert read_results(run).commit == "abc, def+changes"
    assert "| abc, def+changes " in as_markdown([read_results(run)])


def test_read_attempts_of_an_earlier_version(tmp_path):
    old = {"commit": "abc", "machine": "2 x CPU", "seconds": 3.0, "exit_code": 0}
    (tmp_path / ATTEMPTS_FILE).write_text(json.dumps([old | {"peak_ram_mib": 1.0}]))
    assert read_attempts(tmp_path) == [Attempt(3.0, 0, 1.0)]


def test_peak_memory_is_that_of_the_gpu_if_there_is_one(tmp_path):
    run = run_of(tmp_path / "run")
    write_results(run, {40: 30.0})
    (run.output / "log.txt").write_text("lr: 0.1  max_mem: 512M\nlr: 0.1  max_mem: 2048M\n")
    assert (read_results(run).peak_memory_mib, read_results(run).memory_of) == (2048.0, "GPU")


def test_model_without_detections_has_an_ap_of_zero(tmp_path):
    run = run_of(tmp_path / "run")
    write_results(run, {20: 10.0, 40: float("nan")})
    assert (read_results(run).ap, read_results(run).ap75) == (0.0, 0.0)


def test_run_that_was_not_started_has_no_results(tmp_path):
    assert read_results(run_of(tmp_path / "none")) is None


@pytest.mark.parametrize(("aps", "finished"), [({20: 1.0}, False), ({20: 1.0, 40: 2.0}, True)])
def test_run_is_finished_after_the_last_evaluation(tmp_path, aps, finished):
    run = run_of(tmp_path / "run")
    write_results(run, aps)
    (run.output / "model_final.pth").touch()
    assert run.is_finished == finished


def test_incomplete_last_line_of_metrics_is_ignored(tmp_path):
    run = run_of(tmp_path / "run")
    write_results(run, {20: 10.0})
    with (run.output / "metrics.json").open("a") as file:
        file.write('{"iteration": 39, "bbox/AP": 3')
    assert read_results(run).iterations == 33


@pytest.fixture
def three_rows(tmp_path):
    """Three finished seeds of one row, another finished run, and an unfinished one."""
    runs = [run_of(tmp_path / f"a{seed}", seed) for seed in (1, 2, 3)]
    for run, ap in zip(runs, (30.0, 32.0, 34.0), strict=True):
        write_results(run, {20: ap - 10, 40: ap})
    runs += [run_of(tmp_path / name, 1, name) for name in ("stac", "soft_teacher")]
    write_results(runs[3], {20: 9.0, 40: 18.0})
    write_results(runs[4], {20: 9.0})
    return runs


def test_table_has_mean_and_standard_deviation_of_finished_runs(three_rows):
    summary, _, single = as_markdown([read_results(run) for run in three_rows]).partition("\n\n")
    lines = summary.splitlines()[2:]
    assert len(lines) == 2
    assert "| quickstart " in lines[0] and "| 1, 2, 3 " in lines[0]
    assert "32.00 ± 2.00" in lines[0] and "64.00 ± 4.00" in lines[0]  # (n - 1), not n
    assert "stac" in lines[1] and "| 18.00 " in lines[1]
    assert single.count("2 x CPU") == 5 and "33 of 40" in single


def test_tables_leave_out_empty_columns(three_rows):
    results = [read_results(run) for run in three_rows]
    header, *_ = as_markdown(results).splitlines()
    assert "11-point AP50" in header and "peak RAM, MiB" in header
    assert "precision" not in header and "recall" not in header  # not measured
    others = [replace(result, voc_ap50=float("nan"), precision=0.5) for result in results]
    others[3] = replace(others[3], memory_of="GPU")
    header, *_ = as_markdown(others).splitlines()
    assert "11-point AP50" not in header and "precision" in header
    assert "peak RAM, MiB" in header and "peak GPU, MiB" in header


def test_csv_has_all_runs_and_no_unknown_values(three_rows):
    rows = list(csv.DictReader(io.StringIO(as_csv([read_results(run) for run in three_rows]))))
    assert [row["ap"] for row in rows] == ["30.0", "32.0", "34.0", "18.0", ""]
    assert {row["precision"] for row in rows} == {""}
    assert rows[0]["commit"] == "abc" and rows[4]["finished"] == "False"


def test_supervised_run_has_no_threshold(tmp_path):
    run = run_of(tmp_path / "run", method="supervised", options=SHORT[:2])
    write_results(run, {40: 10.0})
    assert np.isnan(read_results(run).threshold) and np.isnan(read_results(run).burn_in)


def test_curves_are_drawn_for_evaluated_runs_only(three_rows, tmp_path):
    drawn, empty = (
        cv2.imdecode(np.frombuffer(draw_curves(runs), np.uint8), cv2.IMREAD_COLOR)
        for runs in (three_rows, [run_of(tmp_path / "none")])
    )
    assert drawn.shape == empty.shape

    def colored(image):
        return int((np.ptp(image.astype(int), axis=2) > 40).sum())

    assert colored(empty) == 0 < colored(drawn)


# --- progress -------------------------------------------------------------------------------------


def test_progress_names_runs_logs_and_the_remaining_time(tmp_path, monkeypatch, capsys):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("time.monotonic", lambda: clock.now)
    first, second, _ = runs = [run_of(tmp_path / f"{seed}", seed) for seed in (1, 2, 3)]
    progress = _Progress(runs, num_finished=0, num_slots=1)
    progress.update([])
    progress.update([first])
    first.output.mkdir()
    (first.output / "metrics.json").write_text('{"iteration": 9, "eta_seconds": 180.0}\n')
    clock.now = 60.0
    progress.update([first])
    write_results(second, {40: 30.0})
    progress.on_run_end(second, Attempt(seconds=120.0, exit_code=0, peak_ram_mib=1.0))
    clock.now = 120.0
    progress.update([first])
    progress.close()
    assert capsys.readouterr().out.splitlines() == [
        "3 runs: 0 already finished, 1 at a time",
        f"started quickstart, seed 1; log: {first.output / 'log.txt'}",
        # 180 s, and two runs of 60 + 180 s
        "running quickstart, seed 1 (iter 10); about 11:00 left",
        f"started quickstart, seed 2; log: {second.output / 'log.txt'}",
        "quickstart, seed 2: AP 30.00, after 120 s",
        # 180 s, and one run of the mean of 120 + 180 s and 120 s
        "running quickstart, seed 1 (iter 10); about 6:30 left",
    ]
    assert progress.failed == []


# --- processes ------------------------------------------------------------------------------------


@pytest.fixture
def scripted(monkeypatch):
    """Make runs execute a script, with their folder and seed as arguments."""

    def make(script):
        monkeypatch.setattr(
            Run, "command", property(lambda run: ["-c", script, str(run.output), str(run.seed)])
        )

    return make


def work(runs, where):
    ended = {}
    RunQueue(runs, where).work(lambda run, attempt: ended.update({run: attempt}), lambda: None)
    return ended


def test_failed_run_does_not_stop_the_others(scripted, tmp_path):
    scripted("import sys; print('out of luck'); sys.exit(int(sys.argv[2]) % 2)")
    runs = [run_of(tmp_path / f"{seed}", seed) for seed in (1, 2, 3)]
    ended = work(runs, [None])
    assert [ended[run].exit_code for run in runs] == [1, 0, 1]
    assert last_line(runs[0].output / CONSOLE_FILE) == "out of luck"
    work(runs[:1], [None])
    assert [attempt.exit_code for attempt in read_attempts(runs[0].output)] == [1, 1]


def test_runs_with_the_same_folder_are_an_error(tmp_path):
    runs = [run_of(tmp_path / name, seed) for name, seed in (("a", 1), ("b", 2), ("a", 3))]
    with pytest.raises(UsageError, match=f"2 runs have the output folder {tmp_path / 'a'}"):
        RunQueue(runs, [None, None])


def test_runs_at_the_same_time_have_different_gpus(scripted, tmp_path):
    """Each run waits for the other one, so they end only if they run at the same time."""
    scripted(
        "import os, pathlib, sys, time\n"
        "here = pathlib.Path(sys.argv[1]); (here / 'there').touch()\n"
        "while len(list(here.parent.glob('*/there'))) < 2: time.sleep(0.01)\n"
        "print(os.environ['CUDA_VISIBLE_DEVICES'])"
    )
    runs = [run_of(tmp_path / f"{seed}", seed) for seed in (1, 2)]
    assert all(attempt.exit_code == 0 for attempt in work(runs, ["0,1", "2,3"]).values())
    assert {last_line(run.output / CONSOLE_FILE) for run in runs} == {"0,1", "2,3"}


def test_peak_memory_of_a_run_is_that_of_its_process(scripted, tmp_path):
    scripted("import sys; block = b'1' * (300 * 2**20 * (int(sys.argv[2]) - 1))")
    small, large = (run_of(tmp_path / f"{seed}", seed) for seed in (1, 2))
    ended = work([small, large], [None])
    # The memory of the small one includes that of this process when it was forked.
    assert ended[large].peak_ram_mib > 300


def test_interrupt_terminates_the_running_process(scripted, tmp_path):
    scripted("import pathlib, sys, time; pathlib.Path(sys.argv[1], 'on').touch(); time.sleep(600)")
    runs = [run_of(tmp_path / f"{seed}", seed) for seed in (1, 2)]
    queue = RunQueue(runs, [None])
    ended = []

    def interrupt():
        if (runs[0].output / "on").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        queue.work(lambda run, attempt: ended.append(run), interrupt)
    assert ended == [] and not runs[1].output.exists()
    (attempt,) = read_attempts(runs[0].output)
    assert attempt.exit_code == -signal.SIGTERM


@pytest.mark.parametrize(
    ("num_gpus", "parallel", "expected"),
    [
        (1, None, ["4", "5", "6", "7", "9"]),
        (1, 2, ["4", "5"]),
        (2, None, ["4,5", "6,7"]),
        (5, None, ["4,5,6,7,9"]),
    ],
)
def test_gpu_slots_divide_the_visible_gpus(monkeypatch, num_gpus, parallel, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7,9")
    assert gpu_slots(num_gpus, parallel, on_gpus=True) == expected
    assert gpu_slots(num_gpus, parallel, on_gpus=False) == [None] * (parallel or 1)


def test_gpu_slots_of_shared_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    assert gpu_slots(1, None, on_gpus=True, runs_per_gpu=2) == ["4", "5", "4", "5"]
    assert gpu_slots(1, 3, on_gpus=True, runs_per_gpu=2) == ["4", "5", "4"]
    with pytest.raises(UsageError, match="5 x 1 GPUs, but 2 are visible"):
        gpu_slots(1, 5, on_gpus=True, runs_per_gpu=2)


def test_gpu_slots_with_too_few_gpus_is_an_error(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(UsageError, match="2 x 2 GPUs, but 2 are visible"):
        gpu_slots(2, 2, on_gpus=True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UsageError, match="1 x 1 GPUs, but 0 are visible"):
        gpu_slots(1, None, on_gpus=True)


# --- command line ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_stopped_comparison_is_resumed(tmp_path, capsys):
    """The terminal closes after a checkpoint; a second call finishes, a third has nothing to do."""
    changed = {"SOLVER.CHECKPOINT_PERIOD": 1, "SOLVER.MAX_ITER": 12, "SEMI.BURN_IN_ITERS": 6}
    settings = TINY | TRAINING | make_datasets(tmp_path / "data") | changed
    output = tmp_path / "out"
    words = [
        *("--config-file", str(ROOT / "configs/Base-LocReweight.yaml")),
        *("--methods", str(METHODS / "loc_reweight.yaml")),
        *("--output", str(output), *as_options(settings)),
    ]
    command = [sys.executable, str(ROOT / "tools/compare.py"), *words]
    # nohup ignores SIGHUP; the process must not inherit that.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    signal.signal(signal.SIGHUP, before)
    (run,) = plan(*words)
    while not (run.output / "last_checkpoint").exists():
        assert first.poll() is None, first.stdout.read()
        time.sleep(0.05)
    first.send_signal(signal.SIGHUP)
    stdout = first.communicate()[0]
    assert first.returncode == 75 and "to resume, repeat the command" in stdout
    assert not run.is_finished

    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 0, second.stdout + second.stderr
    assert [attempt.exit_code == 0 for attempt in read_attempts(run.output)] == [False, True]
    assert "resumed after iteration" in (run.output / CONSOLE_FILE).read_text()
    assert {"results.csv", "table.md", "curves.png"} <= set(os.listdir(output))
    assert "| Base-LocReweight + loc_reweight | 1 " in second.stdout
    assert run.is_finished and read_results(run).ap >= 0

    runs = plan(*words)
    assert run_all(runs, None, lambda: write_report(runs, output)) == []
    assert "1 runs: 1 already finished" in capsys.readouterr().out
    assert len(read_attempts(run.output)) == 2
