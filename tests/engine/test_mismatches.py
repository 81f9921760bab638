"""Checkpoints, settings and data that do not fit together."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

import train_net
from locreweight.checkpoint.checkpointer import CheckpointContents, TeacherCheckpointer
from locreweight.config_checks import check_supported
from locreweight.data.training_sets import load_training_sets, register_datasets
from locreweight.engine import load_for_evaluation
from locreweight.errors import UsageError
from tests.engine.tiny_training import (
    build_trainer,
    restored_loggers_and_signals,
    training_config,
)
from tests.modeling.tiny_model import tiny_config


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    TeacherCheckpointer(build_model(tiny_config()), str(folder)).save("model")
    return str(folder / "model.pth")


@pytest.fixture(scope="module")
def run_of_four_iterations(datasets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    build_trainer(training_config(datasets, folder)).train()
    return folder


def load(checkpoint, settings=None):
    cfg = tiny_config((settings or {}) | {"MODEL.WEIGHTS": str(checkpoint)})
    return load_for_evaluation(cfg, build_model(cfg))


def test_fitting_checkpoint_is_loaded_for_evaluation(checkpoint):
    assert load(checkpoint) is CheckpointContents.DETECTOR


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"MODEL.ROI_BOX_HEAD.FC_DIM": 24}, "fc1.weight"),
        ({"MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True}, "bbox_pred.weight"),
        ({"MODEL.ROI_BOX_HEAD.CORNER_CODING": False}, "CORNER_CODING True"),
    ],
)
def test_checkpoint_of_another_model_is_not_loaded_for_evaluation(checkpoint, settings, words):
    with pytest.raises(UsageError, match=words):
        load(checkpoint, settings)


@pytest.mark.parametrize("resume", [True, False])
def test_training_does_not_start_from_another_box_coding(
    run_of_four_iterations, datasets, tmp_path, resume
):
    file = shutil.copy(run_of_four_iterations / "model_final.pth", tmp_path)
    other = {"MODEL.ROI_BOX_HEAD.CORNER_CODING": False, "MODEL.WEIGHTS": file}
    with pytest.raises(UsageError, match="CORNER_CODING True"):
        build_trainer(training_config(datasets, tmp_path, other), resume=resume)


@pytest.mark.parametrize(("burn_in", "fits"), [(1, True), (4, True), (5, False)])
def test_finished_burn_in_does_not_start_again(
    run_of_four_iterations, datasets, tmp_path, burn_in, fits
):
    """The run had 2 iterations of burn-in."""
    shutil.copy(run_of_four_iterations / "model_final.pth", tmp_path)
    more = {"SEMI.BURN_IN_ITERS": burn_in, "SOLVER.MAX_ITER": 6}
    if fits:
        trainer = build_trainer(training_config(datasets, tmp_path, more), resume=True)
        assert trainer.start_iter == 4
    else:
        with pytest.raises(UsageError, match=r"BURN_IN_ITERS 5 would undo .* after 2 of the 4"):
            build_trainer(training_config(datasets, tmp_path, more), resume=True)


@pytest.mark.parametrize(
    "settings",
    [
        {"MODEL.META_ARCHITECTURE": "ProposalNetwork"},
        {
            "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
            "MODEL.ROI_HEADS.NAME": "CascadeROIHeads",
            "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
        },
        {
            "MODEL.PROPOSAL_GENERATOR.NAME": "PrecomputedProposals",
            "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
            "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
        },
    ],
)
def test_other_detectors_of_detectron2_cannot_be_evaluated(checkpoint, settings):
    key, value = next(iter(settings.items()))
    with pytest.raises(UsageError, match=f"{key} {value} .* use Detectron2's own tools"):
        load(checkpoint, settings)


def test_file_that_is_not_a_checkpoint_is_named(tmp_path):
    (tmp_path / "text.pth").write_text("these are not weights")
    with pytest.raises(UsageError, match=r"text\.pth is not a checkpoint"):
        load(tmp_path / "text.pth")


def test_file_without_weights_is_an_error(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "numbers.pth")
    with pytest.raises(UsageError, match="no weights"):
        load(tmp_path / "numbers.pth")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.LOAD_PROPOSALS", True),
        ("MODEL.MASK_ON", True),
        ("MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True),
        ("MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "giou"),
        ("INPUT.CROP.ENABLED", True),
        ("TEST.PRECISE_BN.ENABLED", True),
        ("TEST.AUG.ENABLED", True),
        ("TEST.EXPECTED_RESULTS", [["bbox", "AP", 38.5, 0.2]]),
        ("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"),
        ("DATALOADER.REPEAT_THRESHOLD", 0.3),
        ("DATASETS.PROPOSAL_FILES_TRAIN", ["proposals.pkl"]),
        ("MODEL.META_ARCHITECTURE", "GeneralizedRCNN"),
        ("MODEL.ROI_HEADS.NAME", "StandardROIHeads"),
        ("MODEL.ROI_HEADS.NAME", "NoHeads"),
    ],
)
def test_unsupported_setting_is_an_error(key, value):
    check_supported(tiny_config())
    with pytest.raises(UsageError, match=key):
        check_supported(tiny_config({key: value}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("TEST.AUG.ENABLED", True),
        ("TEST.EXPECTED_RESULTS", [["bbox", "AP", 38.5, 0.2]]),
        ("MODEL.LOAD_PROPOSALS", True),
        ("DATASETS.PROPOSAL_FILES_TEST", ["proposals.pkl"]),
        ("DATASETS.TEST", ["a", "b", "a"]),
    ],
)
def test_unsupported_setting_is_an_error_in_evaluation(key, value):
    plain = {"INPUT.CROP.ENABLED": True, "MODEL.ROI_HEADS.NAME": "StandardROIHeads"}
    check_supported(tiny_config(plain), training=False)
    with pytest.raises(UsageError, match=key):
        check_supported(tiny_config({key: value}), training=False)


@pytest.mark.parametrize("key", ["TRAIN", "UNLABELED", "TEST"])
def test_data_set_that_is_named_twice_is_an_error(key):
    with pytest.raises(UsageError, match=rf"DATASETS\.{key} contains 'a' more than once"):
        check_supported(tiny_config({f"DATASETS.{key}": ["a", "b", "a"]}))


@pytest.mark.parametrize(("names", "wrong"), [("(0, 1)", "0"), ("(True, False)", "True")])
def test_class_name_that_is_no_text_is_an_error(names, wrong):
    message = f"DATASETS.CLASS_NAMES contains {wrong}: use a text in quotes, such as '{wrong}'"
    with pytest.raises(UsageError, match=message):
        check_supported(tiny_config({"DATASETS.CLASS_NAMES": names}))


@pytest.mark.parametrize(
    ("key", "values", "text"),
    [
        ("SEMI.PSEUDO_LABEL_THRESHOLD", (-0.1, 1.0, 80.0), "at least 0 and below 1"),
        ("SEMI.BURN_IN_ITERS", (-1,), "at least 0"),
        ("SEMI.UNSUPERVISED_WEIGHT", (-1.0, -4.0), "at least 0"),
        ("SEMI.QUALITY_SCALE", (0.0, -1.0), "above 0"),
        ("SOLVER.BASE_LR", (0.0, -0.1), "above 0"),
        ("SOLVER.IMS_PER_BATCH_UNLABELED", (-4,), "at least 0"),
        ("TEST.MONITORED_IMAGES", (-1,), "at least 0"),
    ],
)
def test_value_out_of_range_is_an_error(key, values, text):
    for value in values:
        with pytest.raises(UsageError, match=rf"{key} is {value}; it must be {text}"):
            check_supported(tiny_config({key: value}))


def test_unlabeled_test_images_give_a_warning_or_are_excluded(datasets, tmp_path, caplog):
    _, _, test_images = datasets["DATASETS.TEST"][0].split(":")
    settings = {
        "DATASETS.TEST": datasets["DATASETS.TEST"],
        "DATASETS.UNLABELED": [f"folder:{test_images}", *datasets["DATASETS.UNLABELED"]],
    }
    cfg = training_config(datasets, tmp_path, settings)
    register_datasets(cfg)
    with caplog.at_level(logging.WARNING):
        assert len(load_training_sets(cfg).unlabeled) == 3 + 5
    assert "3 unlabeled images are also in the test sets" in caplog.text
    cfg = training_config(datasets, tmp_path, settings | {"DATASETS.EXCLUDE_LABELED": True})
    assert len(load_training_sets(cfg).unlabeled) == 5


def test_metrics_of_pseudo_labels_are_printed(datasets, tmp_path, caplog):
    trainer = build_trainer(training_config(datasets, tmp_path))
    with caplog.at_level(logging.INFO, logger="locreweight"):
        trainer.train()
    (line,) = [r.getMessage() for r in caplog.records if "pseudo_labels/per_image: " in r.message]
    assert "proposals/foreground_per_image: " in line


def test_error_in_a_loader_process_is_one_line(datasets, tmp_path):
    settings = {"DATALOADER.NUM_WORKERS": 1, "DATASETS.CHECKS.DECODE_IMAGES": False}
    _, json_file, images = datasets["DATASETS.TRAIN"][0].split(":")
    folder = tmp_path / "images"
    folder.mkdir()
    for file in Path(images).iterdir():
        (folder / file.name).write_bytes(b"not an image")
    broken = {"DATASETS.TRAIN": [f"coco:{json_file}:{folder}"]}
    cfg = training_config(datasets, tmp_path / "output", settings | broken)
    file = tmp_path / "config.yaml"
    file.write_text(cfg.dump())
    arguments = train_net.argument_parser().parse_args(["--config-file", str(file)])
    with restored_loggers_and_signals(), pytest.raises(SystemExit) as exit_:
        train_net.launch(train_net.main, arguments)
    error = exit_.value.code
    assert error.startswith("error: cannot read or augment the image ") and str(folder) in error
    assert "\n" not in error


# --- resuming a run of another version or optimizer -----------------------------------------------


@pytest.mark.parametrize("missing", ["finished", "seed", "optimizer", "skipped_steps"])
def test_checkpoint_of_another_version_is_an_error_of_one_line(
    run_of_four_iterations, datasets, tmp_path, missing
):
    content = torch.load(run_of_four_iterations / "model_final.pth", weights_only=True)
    del content["trainer"][missing]
    torch.save(content, tmp_path / "model_final.pth")
    with pytest.raises(UsageError, match=rf"model_final\.pth: .*another version.*'{missing}'") as e:
        build_trainer(training_config(datasets, tmp_path), resume=True)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "changed",
    [
        {"SOLVER.WEIGHT_DECAY_BIAS": 0.5, "SOLVER.BIAS_LR_FACTOR": 2.0},
        {"SOLVER.OPTIMIZER": "AdamW"},
        {"MODEL.BACKBONE.FREEZE_AT": 2},
    ],
)
def test_run_is_not_resumed_with_another_optimizer(
    run_of_four_iterations, datasets, tmp_path, changed
):
    shutil.copy(run_of_four_iterations / "model_final.pth", tmp_path)
    with pytest.raises(UsageError, match="another optimizer or model") as e:
        build_trainer(training_config(datasets, tmp_path, changed), resume=True)
    assert "\n" not in str(e.value)


def test_empty_output_dir_is_an_error(datasets):
    with pytest.raises(UsageError, match="OUTPUT_DIR is empty"):
        build_trainer(training_config(datasets, ""))
