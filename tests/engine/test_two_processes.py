"""Training in two processes with Gloo on the CPU."""

import json
import math
import shutil

import pytest
import torch

from locreweight.engine import evaluate
from tests.engine import two_processes
from tests.engine.tiny_training import build_trainer, recorded_training, same, training_config
from tests.in_two_processes import run_in_two_processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("two_processes")


@pytest.fixture(scope="module")
def ranks(datasets, folder):
    """The final state of both processes."""
    run_in_two_processes(two_processes.train, datasets, folder)
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def one_process(datasets, tmp_path_factory):
    """Output folder and record of the same training in one process."""
    folder = tmp_path_factory.mktemp("one_process")
    cfg = training_config(datasets, folder, two_processes.SETTINGS)
    trainer = build_trainer(cfg)
    return folder, recorded_training(trainer), trainer.settings.method.files


@pytest.mark.parametrize("model", ["start", "student", "teacher"])
def test_both_processes_have_the_same_weights_and_batch_norm_statistics(ranks, model):
    """Although each process drew different initial weights."""
    first, second = (rank[model] for rank in ranks)
    assert any("running_mean" in name for name in first)
    assert same(first, second)


@pytest.mark.parametrize("model", ["students", "teachers"])
def test_both_processes_have_the_same_weights_after_each_step(ranks, model):
    """One process has pseudo-labels and the other has none; some steps are skipped."""
    first, second = (rank[model] for rank in ranks)
    assert len(first) == two_processes.SETTINGS["SOLVER.MAX_ITER"]
    assert all(same(a, b) for a, b in zip(first, second, strict=True))


SKIPPED = {two_processes.NAN_LOSS[1], two_processes.NAN_GRADIENT[1]}


def test_skipped_steps_do_not_change_the_student(ranks):
    students = ranks[0]["students"]
    for i in range(1, len(students)):
        assert same(students[i], students[i - 1]) == (i in SKIPPED), i


@pytest.mark.parametrize("i", sorted(SKIPPED))
def test_skipped_steps_update_the_teacher_with_the_unchanged_student(ranks, i):
    """The keep rate counts iterations, including skipped ones."""
    before, after = ranks[0]["teachers"][i - 1 : i + 1]
    student = ranks[0]["students"][i]
    rate = min(0.6, 1 - 1 / (i + 1 - two_processes.SETTINGS["SEMI.BURN_IN_ITERS"] + 1))
    for name, value in student.items():
        expected = rate * before[name] + (1 - rate) * value
        if value.is_floating_point():
            torch.testing.assert_close(after[name], expected, rtol=1e-5, atol=1e-7, msg=name)
        else:
            assert torch.equal(after[name], value), name


def test_both_processes_skip_the_same_steps(ranks, folder):
    lines = [json.loads(line) for line in (folder / "skipped_steps.jsonl").read_text().splitlines()]
    assert [(line["iteration"], line["process"]) for line in lines] == [
        (3, 0),
        (3, 1),
        (5, 0),
        (5, 1),
    ]
    assert {line["problem"] for line in lines[:2]} == {"loss_cls is nan in process 0"}
    assert lines[0]["losses"]["loss_cls"] == "nan" and lines[1]["losses"]["loss_cls"] != "nan"
    assert all("the gradient of" in line["problem"] for line in lines[2:])
    assert not set(lines[0]["images"]) & set(lines[1]["images"])


def test_training_changes_both_models(ranks):
    state = ranks[0]
    assert not same(state["start"], state["student"])
    assert not same(state["student"], state["teacher"])


def test_two_processes_share_the_batches_of_one_process(ranks, one_process):
    alone = one_process[1].images
    assert len(alone) == two_processes.SETTINGS["SOLVER.MAX_ITER"]
    for whole, *parts in zip(alone, *(rank["images"] for rank in ranks), strict=True):
        assert sorted(whole) == sorted([*parts[0], *parts[1]])
        assert len(parts[0]) == len(parts[1])


def test_state_of_the_method_is_that_of_one_process(ranks, one_process):
    """Observations of all processes arrive in the order of the processes."""
    files = ranks[0]["files"]
    assert files == ranks[1]["files"]
    assert len(files) == 7 * two_processes.SETTINGS["SOLVER.IMS_PER_BATCH_UNLABELED"]
    assert files == one_process[2]


def test_both_processes_have_the_same_cached_images(ranks):
    """Two new ones of each process in each step, of which the cache holds the last eight."""
    first, second = (rank["cache"] for rank in ranks)
    assert len(first) == len(second) == 8
    assert all(same(a, b) for a, b in zip(first, second, strict=True))
    assert {"image", "boxes", "classes", "gt_score", "gt_certainty"} == set(first[0])
    assert same(ranks[0]["cache_student"], ranks[1]["cache_student"])


def test_both_processes_have_the_same_members(ranks):
    for first, second in zip(*(rank["members"] for rank in ranks), strict=True):
        assert any(name.startswith("members.1.") for name in first)
        assert same(first, second)


def test_both_processes_have_the_same_memory(ranks):
    """It has the images of both processes."""
    first, second = (rank["memory"] for rank in ranks)
    assert len(first) == len(second) == 2
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys() and len(a) > two_processes.MEMBERS["SOLVER.MAX_ITER"]
        assert all(same(a[file], b[file]) for file in a)
    assert any(len(entry["boxes"]) for entry in first[0].values())


def test_logged_metrics_are_means_over_both_processes(ranks):
    """NaN is ignored, and the highest score is a maximum."""
    logged, first, second = (
        ranks[0]["logged"],
        ranks[0]["own_metrics"],
        ranks[1]["own_metrics"],
    )
    assert first["pseudo_labels/per_image"] > 0 == second["pseudo_labels/per_image"]
    assert math.isnan(second["pseudo_labels/localization_quality"])
    for name in first:
        known = [value for value in (first[name], second[name]) if not math.isnan(value)]
        highest = name == "pseudo_labels/highest_score"
        expected = max(known) if highest else sum(known) / len(known)
        assert logged[name] == pytest.approx(expected, rel=1e-6), name
    losses = [value for name, value in logged.items() if name.startswith("loss_")]
    assert len(losses) == 8
    assert logged["total_loss"] == pytest.approx(sum(losses), rel=1e-6)


def test_evaluation_gathers_the_detections_of_both_processes(ranks):
    """There are three test images, so neither process could reach 100 alone."""
    assert ranks[0]["results"]["bbox"]["AP"] == pytest.approx(100)
    assert not ranks[1]["results"].get("bbox")


def test_one_process_resumes_with_the_same_split_and_results(ranks, datasets, folder, tmp_path):
    """The student is evaluated, whose AP is neither 0 nor 100."""
    assert ranks[0]["labeled"] == ranks[1]["labeled"]
    images = datasets["DATASETS.TEST"][0].rpartition(":")[2]
    solved = {"DATASETS.TEST": [f"coco:{folder / 'solved.json'}:{images}"]}
    cfg = training_config(datasets, tmp_path, two_processes.SETTINGS | solved)
    for name in ("model_final.pth", "last_checkpoint"):
        shutil.copy(folder / name, tmp_path)
    alone = build_trainer(cfg, resume=True)
    assert [record["file_name"] for record in alone.sets.labeled] == ranks[0]["labeled"]
    assert alone.start_iter == two_processes.SETTINGS["SOLVER.MAX_ITER"]
    results, expected = evaluate(cfg, alone.student), ranks[0]["students_results"]
    assert 0 < expected["bbox"]["AP"] < 100
    assert dict(results["bbox"]) == pytest.approx(expected["bbox"], abs=0, nan_ok=True)


def test_checkpoint_has_the_fields_of_one_process(ranks, folder, one_process):

    def fields(value):
        if not isinstance(value, dict):
            return type(value)
        return {key: fields(x) for key, x in value.items() if key != "history"}

    one, two = (
        torch.load(f / "model_final.pth", weights_only=True) for f in (one_process[0], folder)
    )
    assert fields(one) == fields(two)
