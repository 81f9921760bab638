"""Training in two processes, over GLOO on the CPU."""

import math
from datetime import timedelta

import pytest
import torch
from detectron2.engine import launch

from tests.engine import two_processes
from tests.engine.tiny_training import build_trainer, recorded_training, same, training_config


@pytest.fixture(scope="module")
def ranks(datasets, tmp_path_factory):
    """What the two processes had in the end."""
    folder = tmp_path_factory.mktemp("two_processes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        launch(
            two_processes.train,
            2,
            dist_url="auto",
            args=(datasets, folder),
            timeout=timedelta(minutes=10),
        )
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("model", ["start", "student", "teacher"])
def test_both_processes_have_the_same_weights_and_statistics(ranks, model):
    """From the start, though each drew its own random weights; and batch norm's numbers too."""
    first, second = (rank[model] for rank in ranks)
    assert any("running_mean" in name for name in first)
    assert same(first, second)


def test_training_changed_the_models(ranks):
    state = ranks[0]
    assert not same(state["start"], state["student"])
    assert not same(state["student"], state["teacher"])


def test_together_they_see_the_images_of_one_process(ranks, datasets, tmp_path):
    """Each labeled and unlabeled image once, whatever the number of processes."""
    cfg = training_config(datasets, tmp_path, two_processes.SETTINGS)
    alone = recorded_training(build_trainer(cfg)).images
    assert len(alone) == 4
    for whole, *parts in zip(alone, *(rank["images"] for rank in ranks), strict=True):
        assert sorted(whole) == sorted([*parts[0], *parts[1]])
        assert len(parts[0]) == len(parts[1])


def test_what_is_logged_is_the_mean_of_both_processes(ranks):
    """Of what only one of them can know, it is that one's; of the highest score, the higher."""
    logged, first, second = ranks[0]["logged"], ranks[0]["mine"], ranks[1]["mine"]
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
    """Three images, two processes: without those of the other no one would reach 100."""
    assert ranks[0]["results"]["bbox"]["AP"] == pytest.approx(100)
    assert not ranks[1]["results"].get("bbox")
