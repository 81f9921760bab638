"""Files that do not fit the model, and settings that have no effect, are said to be so."""

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from locreweight.checkpoint.checkpointer import TeacherCheckpointer
from locreweight.config import check_supported
from locreweight.data.training_sets import load_training_sets, register_datasets
from locreweight.engine import load_for_evaluation
from locreweight.errors import UsageError
from tests.engine.tiny_training import build_trainer, training_config
from tests.modeling.tiny_model import tiny_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    TeacherCheckpointer(build_model(tiny_config()), str(folder)).save("model")
    return str(folder / "model.pth")


def evaluated(checkpoint, settings=None):
    cfg = tiny_config((settings or {}) | {"MODEL.WEIGHTS": str(checkpoint)})
    return load_for_evaluation(cfg, build_model(cfg))


def test_a_checkpoint_that_fits_is_evaluated(checkpoint):
    assert evaluated(checkpoint) == "a detector of this project"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"MODEL.ROI_BOX_HEAD.FC_DIM": 24}, "fc1.weight"),
        ({"MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True}, "bbox_pred.weight"),
        ({"MODEL.ROI_BOX_HEAD.CORNER_CODING": False}, "CORNER_CODING True"),
    ],
)
def test_a_checkpoint_of_another_model_is_not_evaluated(checkpoint, settings, words):
    with pytest.raises(UsageError, match=words):
        evaluated(checkpoint, settings)


@pytest.mark.parametrize("resume", [True, False])
def test_training_does_not_go_on_in_another_box_coding(datasets, tmp_path, resume):
    trainer = build_trainer(training_config(datasets, tmp_path))
    trainer.iter = 0
    trainer.checkpointer.save("model")
    other = {"MODEL.ROI_BOX_HEAD.CORNER_CODING": False, "MODEL.WEIGHTS": f"{tmp_path}/model.pth"}
    with pytest.raises(UsageError, match="CORNER_CODING True"):
        build_trainer(training_config(datasets, tmp_path, other), resume=resume)


@pytest.mark.parametrize(("burn_in", "fits"), [(1, True), (4, True), (5, False)])
def test_burn_in_that_is_over_does_not_begin_again(datasets, tmp_path, burn_in, fits):
    build_trainer(training_config(datasets, tmp_path)).train()  # 4 iterations, 2 of them burn-in
    more = {"SEMI.BURN_IN_ITERS": burn_in, "SOLVER.MAX_ITER": 6}
    if fits:
        trainer = build_trainer(training_config(datasets, tmp_path, more), resume=True)
        assert trainer.start_iter == 4
    else:
        with pytest.raises(UsageError, match=r"BURN_IN_ITERS 5 would undo .* after 2 of the 4"):
            build_trainer(training_config(datasets, tmp_path, more), resume=True)


def test_a_file_that_is_no_checkpoint_is_named(tmp_path):
    (tmp_path / "text.pth").write_text("these are not weights")
    with pytest.raises(UsageError, match=r"text\.pth is not a checkpoint"):
        evaluated(tmp_path / "text.pth")


def test_a_file_without_weights_is_an_error(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "numbers.pth")
    with pytest.raises(UsageError, match="no weights"):
        evaluated(tmp_path / "numbers.pth")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.MASK_ON", True),
        ("MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True),
        ("MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "giou"),
        ("INPUT.CROP.ENABLED", True),
        ("TEST.PRECISE_BN.ENABLED", True),
    ],
)
def test_a_setting_without_effect_is_an_error(key, value):
    check_supported(tiny_config())
    with pytest.raises(UsageError, match=key):
        check_supported(tiny_config({key: value}))


def test_unlabeled_test_images_are_warned_of_or_left_out(datasets, tmp_path, caplog):
    _, _, test_images = datasets["DATASETS.TEST"][0].split(":")
    settings = {
        "DATASETS.TEST": datasets["DATASETS.TEST"],
        "DATASETS.UNLABELED": [f"folder:{test_images}", *datasets["DATASETS.UNLABELED"]],
    }
    cfg = training_config(datasets, tmp_path, settings)
    register_datasets(cfg)
    with caplog.at_level(logging.WARNING):
        assert len(load_training_sets(cfg).unlabeled) == 3 + 5
    assert "3 unlabeled images are in the test sets" in caplog.text
    cfg = training_config(datasets, tmp_path, settings | {"DATASETS.EXCLUDE_LABELED": True})
    assert len(load_training_sets(cfg).unlabeled) == 5


def test_what_mutual_learning_measures_is_printed(datasets, tmp_path, caplog):
    trainer = build_trainer(training_config(datasets, tmp_path))
    with caplog.at_level(logging.INFO, logger="locreweight"):
        trainer.train()
    (line,) = [r.getMessage() for r in caplog.records if "pseudo_labels/per_image: " in r.message]
    assert "proposals/foreground_per_image: " in line


def test_an_error_in_a_loader_process_is_one_line(datasets, tmp_path):
    settings = {"DATALOADER.NUM_WORKERS": 1, "DATASETS.CHECKS.DECODE_IMAGES": False}
    cfg = training_config(datasets, tmp_path / "output", settings)
    register_datasets(cfg)
    labeled = load_training_sets(cfg).labeled
    folder = tmp_path / "images"
    folder.mkdir()
    for record in labeled:
        (folder / Path(record["file_name"]).name).write_bytes(b"not an image")
    _, json_file, _ = cfg.DATASETS.TRAIN[0].split(":")
    cfg.DATASETS.TRAIN = (f"coco:{json_file}:{folder}",)
    file = tmp_path / "config.yaml"
    file.write_text(cfg.dump())
    command = [sys.executable, "train_net.py", "--config-file", str(file)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: cannot read or augment the image ") and str(folder) in last


# --- a run of another version, or with another optimizer ------------------------------------------


@pytest.fixture(scope="module")
def run_of_one_iteration(datasets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    build_trainer(training_config(datasets, folder, {"SOLVER.MAX_ITER": 1})).train()
    return folder


@pytest.mark.parametrize("lacking", ["finished", "seed", "optimizer", "skipped_steps"])
def test_a_checkpoint_of_another_version_is_told_in_one_line(
    run_of_one_iteration, datasets, tmp_path, lacking
):
    content = torch.load(run_of_one_iteration / "model_final.pth", weights_only=True)
    del content["trainer"][lacking]
    torch.save(content, tmp_path / "model_final.pth")
    with pytest.raises(UsageError, match=rf"model_final\.pth: .*another version.*'{lacking}'") as e:
        build_trainer(training_config(datasets, tmp_path), resume=True)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "changed",
    [
        {"SOLVER.WEIGHT_DECAY_BIAS": 0.5, "SOLVER.BIAS_LR_FACTOR": 2.0},
        {"MODEL.BACKBONE.FREEZE_AT": 2},
    ],
)
def test_a_run_is_not_resumed_with_another_optimizer(
    run_of_one_iteration, datasets, tmp_path, changed
):
    shutil.copy(run_of_one_iteration / "model_final.pth", tmp_path)
    with pytest.raises(UsageError, match="another optimizer or model") as e:
        build_trainer(training_config(datasets, tmp_path, changed), resume=True)
    assert "\n" not in str(e.value)


def test_a_run_needs_a_folder(datasets):
    with pytest.raises(UsageError, match="OUTPUT_DIR is empty"):
        build_trainer(training_config(datasets, ""))
