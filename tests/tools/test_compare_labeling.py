"""Comparison of suggested and random labels: splits, settings and the table. Nothing is trained."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

import compare
import compare_labeling
from locreweight.data.datasets.splits import split_annotated
from locreweight.data.training_sets import register_datasets
from locreweight.engine import labeling_comparison
from locreweight.engine.labeling_comparison import (
    LabelingPlan,
    LabelingResult,
    _check_split,
    _result,
    labeling_table,
    write_suggested_split,
)
from locreweight.errors import UsageError
from tests.modeling.tiny_model import TINY, as_options
from tests.tiny_data import make_coco

ROOT = Path(__file__).parents[2]


@pytest.fixture
def plan(run, tmp_path):
    """5 + 5 of 20 annotated images; the tiny run takes the place of the first model."""
    file, images = make_coco(tmp_path / "data", images=20)
    settings = TINY | {"DATASETS.TRAIN": (f"coco:{file}:{images}",), "MODEL.DEVICE": "cpu"}
    config = tmp_path / "tiny.yaml"
    config.write_text("VERSION: 2\n")
    options = tuple(as_options(settings))
    plan = LabelingPlan(config, tmp_path / "out", percent=25.0, add=25.0, options=options)
    plan.first(1).output.parent.mkdir(parents=True)
    plan.first(1).output.symlink_to(run.output)
    return plan


def labeled(run):
    register_datasets(run.cfg)
    (name,) = run.cfg.DATASETS.TRAIN
    records = list(labeling_comparison.DatasetCatalog.get(name))
    return {record["image_id"] for record in split_annotated(run.cfg, {name: records})[0]}


def test_both_splits_add_as_many_images_to_the_first(plan):
    write_suggested_split(plan, 1)
    first, random, suggested = map(labeled, (plan.first(1), plan.random(1), plan.suggested(1)))
    assert len(first) == 5 and len(random) == len(suggested) == 10
    assert first < random and first < suggested
    before = plan.split_file(1).read_text()
    write_suggested_split(plan, 1)
    assert plan.split_file(1).read_text() == before


def test_runs_differ_only_in_their_labels(plan):
    write_suggested_split(plan, 1)
    random, suggested = plan.random(1).cfg, plan.suggested(1).cfg
    random.defrost()
    random.OUTPUT_DIR, random.DATASETS.SPLIT_FILE = suggested.OUTPUT_DIR, str(plan.split_file(1))
    assert random == suggested
    assert plan.first(2).cfg.DATASETS.SPLIT_SEED == plan.first(2).cfg.SEED == 2


def test_parts_are_done_in_order_and_splits_are_kept(plan, monkeypatch):
    trained = []
    monkeypatch.setattr(labeling_comparison, "check_run", lambda run: None)
    monkeypatch.setattr(
        labeling_comparison, "_train", lambda runs, parallel: trained.append([*map(str, runs)])
    )
    monkeypatch.setattr(labeling_comparison, "_result", lambda name, run: (name, run.seed))
    results = labeling_comparison.compare_labeling(plan, [1, 1], None)
    assert results == [("first", 1), ("random", 1), ("suggested", 1)]
    assert [len(runs) for runs in trained] == [1, 2]
    content = json.loads(plan.split_file(1).read_text())
    plan.split_file(1).write_text(json.dumps(content | {"kept": True}))
    labeling_comparison.compare_labeling(plan, [1], None)
    assert json.loads(plan.split_file(1).read_text())["kept"]


@pytest.mark.parametrize(("percent", "add"), [(0, 5), (5, -1), (60, 50)])
def test_impossible_percentages_are_an_error(call, tmp_path, percent, add):
    words = ["--config-file", "a.yaml", "--output", tmp_path, "--percent", percent, "--add", add]
    assert "at most 100" in call(compare_labeling, *words)[0]


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        (("SEED", "7"), "SEED is set by --seeds"),
        (("DATASETS.SPLIT_SEED", "7"), "DATASETS.SPLIT_SEED is set by --seeds"),
        (("DATASETS.LABELED_PERCENT", "7"), "LABELED_PERCENT is set by --percent and --add"),
        (("DATASETS.SPLIT_FILE", "a.json"), "draws its splits with --percent"),
        (("OUTPUT_DIR", "x"), "OUTPUT_DIR is set by --output"),
        (("DATASETS.TEST", "()"), "0 sets in DATASETS.TEST"),
        (("SOLVER.EARLY_STOPPING_PATIENCE", "3"), "may end early"),
    ],
)
def test_options_that_do_not_fit_are_an_error_before_training(tmp_path, option, problem):
    plan = LabelingPlan(ROOT / "configs/quickstart.yaml", tmp_path / "out", options=option)
    with pytest.raises(UsageError, match=problem):
        labeling_comparison.compare_labeling(plan, [2], None)


def test_all_labels_are_an_error_if_no_unlabeled_images_remain(tmp_path, monkeypatch):
    monkeypatch.setattr(labeling_comparison, "_train", lambda runs, parallel: pytest.fail("trains"))
    config, options = ROOT / "configs/quickstart.yaml", ("DATASETS.UNLABELED", "()")
    plan = LabelingPlan(config, tmp_path / "out", percent=50.0, add=50.0, options=options)
    with pytest.raises(UsageError, match="leave no unlabeled images"):
        labeling_comparison.compare_labeling(plan, [1], None)
    supervised, other_images = replace(plan, method="supervised"), replace(plan, options=())
    for valid in (replace(plan, percent=49.0), supervised, other_images):
        _check_split(valid, valid.random(1).cfg)


def test_model_without_detections_has_an_ap_of_zero(plan, tmp_path):
    plan = replace(plan, output=tmp_path / "new")
    run = plan.first(1)
    run.output.mkdir(parents=True)
    (run.output / "config.yaml").write_text(run.cfg.dump())
    end = run.cfg.SOLVER.MAX_ITER
    (run.output / "metrics.json").write_text(f'{{"iteration": {end}, "bbox/AP": NaN}}\n')
    assert _result("first", run) == LabelingResult("first", 1, images=5, boxes=10, ap=0.0)


def test_table_has_means_and_the_difference_of_each_seed():
    values = {"first": (10.0, 12.0), "random": (20.0, 24.0), "suggested": (23.0, 25.0)}
    results = [
        LabelingResult(labels, seed, 5 if labels == "first" else 10, 7 + seed, aps[seed])
        for seed in (0, 1)
        for labels, aps in values.items()
    ]
    lines = labeling_table(results).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[2] == ["first", "5", "7.5", "11.00 ± 1.41"]
    assert cells[4] == ["suggested", "10", "7.5", "24.00 ± 1.41"]
    assert cells[5] == ["suggested - random", "", "", "2.00 ± 1.41"]
    assert "±" not in labeling_table(results[:3])


@pytest.fixture
def _restored_signals():
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_restored_signals")
@pytest.mark.parametrize(("tool", "work"), [(compare, "run_all"), (compare_labeling, None)])
def test_interrupted_comparisons_exit_as_trainings_do(call, monkeypatch, tmp_path, tool, work):
    def interrupted(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(tool, work or tool.__name__, interrupted)
    config = ["--config-file", ROOT / "configs/quickstart.yaml"]
    code, printed = call(tool, *config, "--output", tmp_path)
    assert code == 75
    assert printed.err == "stopped; to resume, repeat the command\n"
