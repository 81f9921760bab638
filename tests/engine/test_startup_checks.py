"""Checks before training: device, config and data."""

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import distributed

from locreweight.data.datasets.splits import split_indices
from locreweight.data.inspection.findings import Severity
from locreweight.engine import check_device
from locreweight.engine.startup_checks import log_effective_values
from locreweight.errors import UsageError
from tests.checked_data import Project
from tests.engine.tiny_training import TRAINING
from tests.modeling.tiny_model import TIMM_BACKBONES, tiny_config
from tests.tiny_data import edit_json

EFFICIENTNET = TIMM_BACKBONES["timm_efficientnet"]

# --- device ---------------------------------------------------------------------------------------


@pytest.fixture
def pretend_machine(monkeypatch):
    """Pretends a number of GPUs and of processes."""

    def pretend(gpus, processes=1):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: processes)
        monkeypatch.setattr(distributed, "get_backend", lambda: "nccl" if gpus else "gloo")

    return pretend


@pytest.mark.parametrize(
    ("device", "gpus", "processes", "message"),
    [
        ("cuda", 0, 1, "no GPU here: add MODEL.DEVICE cpu"),
        ("cuda:1", 0, 1, "no GPU here"),
        ("cuda:1", 1, 1, "no GPU cuda:1: this machine has 1"),
        ("cdua", 1, 1, "no device 'cdua': use cuda or cpu"),
        ("cuda:0", 2, 2, "MODEL.DEVICE cuda:0 would put all processes on one GPU"),
        ("cpu", 2, 2, "MODEL.DEVICE is cpu.*CUDA_VISIBLE_DEVICES=''"),
    ],
)
def test_check_device_rejects_impossible_devices(pretend_machine, device, gpus, processes, message):
    pretend_machine(gpus, processes)
    with pytest.raises(UsageError, match=message):
        check_device(device)


@pytest.mark.parametrize(
    ("device", "gpus", "processes"),
    [("cuda", 1, 1), ("cuda:1", 2, 1), ("cuda", 2, 2), ("cpu", 2, 1), ("cpu", 0, 2)],
)
def test_check_device_accepts_possible_devices(pretend_machine, device, gpus, processes):
    pretend_machine(gpus, processes)
    check_device(device)


# --- effective values -----------------------------------------------------------------------------


@pytest.fixture
def log_of(caplog):
    """The log of the effective values of a config, with 5 labeled and 5 unlabeled images."""

    def log(settings=None):
        sets = SimpleNamespace(labeled=range(5), unlabeled=range(5), class_names=["cat", "dog"])
        with caplog.at_level(logging.INFO, logger="locreweight"):
            log_effective_values(tiny_config(TRAINING | (settings or {})), sets)
        return caplog.text

    return log


def test_effective_values_are_logged(log_of):
    log = log_of({"SOLVER.IMS_PER_BATCH_UNLABELED": 3, "SOLVER.MAX_ITER": 12})
    for part in (
        "data: 5 labeled, 5 unlabeled and 0 test images; 2 classes (cat, dog)",
        "on 1 process(es)",
        "2 labeled + 3 unlabeled images per iteration (2 + 3 per process)",
        "learning rate 0.001",
        "12 iterations of which 2 burn-in",
        "4.8 epochs of 5 labeled",  # 12 * 2 / 5
        "6.0 epochs of 5 unlabeled",  # 10 * 3 / 5
    ):
        assert part in log


@pytest.mark.parametrize(
    ("burn_in", "level"), [(3, None), (4, logging.WARNING), (10**9, logging.INFO)]
)
def test_burn_in_without_end_is_a_warning_unless_intended(log_of, caplog, burn_in, level):
    log_of({"SEMI.BURN_IN_ITERS": burn_in, "SOLVER.MAX_ITER": 4})
    levels = [r.levelno for r in caplog.records if "images are not used" in r.getMessage()]
    assert levels == ([level] if level else [])


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        ({}, ""),
        ({"MODEL.BACKBONE.FREEZE_AT": 2}, "set MODEL.BACKBONE.FREEZE_AT 0. "),
        ({"MODEL.RESNETS.NORM": "FrozenBN"}, "set MODEL.RESNETS.NORM BN. "),
        (EFFICIENTNET, ""),
        (EFFICIENTNET | {"MODEL.TIMM.NORM": "FrozenBN"}, "set MODEL.TIMM.NORM BN. "),
        (EFFICIENTNET | {"MODEL.TIMM.NORM": "FrozenBN", "MODEL.TIMM.PRETRAINED": "hub"}, ""),
    ],
)
def test_frozen_random_backbone_gives_a_warning(log_of, settings, fix):
    log = log_of(settings)
    assert ("keeps its random weights" in log) == bool(fix)
    assert fix in log


# --- config and data ------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"DATASETS.UNLABELED": ()}, "there are no unlabeled images to learn from"),
        ({"SOLVER.IMS_PER_BATCH_UNLABELED": 0}, "there are no unlabeled images to learn from"),
        ({"DATASETS.UNLABELED_TRUTH": ["coco:/no.json:/tmp"]}, "the file '/no.json' of the data"),
        ({"MODEL.WEIGHTS": "/no.pth"}, "MODEL.WEIGHTS '/no.pth' does not exist"),
        ({"DATASETS.SPLIT_FILE": "/no.json"}, "cannot read DATASETS.SPLIT_FILE '/no.json'"),
        ({"DATASETS.LABELED_PERCENT": 0.0}, "DATASETS.LABELED_PERCENT"),
        (
            {"DATASETS.CHECKS.MAX_UNREADABLE_SHARE": 2.0},
            "DATASETS.CHECKS.MAX_UNREADABLE_SHARE must be in",
        ),
        ({"SEMI.METHOD": "Nobody"}, "unknown SEMI.METHOD 'Nobody'"),
        ({"INPUT.AUGMENTATION_POLICY": "Nobody"}, "unknown INPUT.AUGMENTATION_POLICY 'Nobody'"),
        ({"SOLVER.REFERENCE_WORLD_SIZE": 3}, "SOLVER.IMS_PER_BATCH = 4 cannot be divided equally"),
    ],
    ids=str,
)
def test_errors_of_training_are_findings_and_the_report_is_complete(project, settings, message):
    project.settings |= settings
    report = project.report()
    (error,) = report.findings
    assert error.severity is Severity.ERROR and message in error.text
    assert report.overview and report.options == project.options


def test_split_without_any_box_is_an_error(project):
    def leave_one(content):
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] == 1]

    edit_json(project.json, leave_one)
    labeled = split_indices(5, 20.0, 1)[0]
    assert labeled != [0]
    project.settings["DATASETS.LABELED_PERCENT"] = 20.0
    (error,) = project.texts(Severity.ERROR)
    assert "has a box to train on" in error and "DATASETS.LABELED_PERCENT" in error


@pytest.mark.parametrize(
    ("broken", "settings", "stops"),
    [
        (2, {}, True),
        (2, {"DATASETS.CHECKS.MAX_UNREADABLE_SHARE": 0.5}, False),
        (1, {}, False),  # a single file never stops a run
        (1, {"DATASETS.CHECKS.MAX_UNREADABLE_SHARE": 0.0}, True),
        (2, {"SEMI.BURN_IN_ITERS": 10**6}, False),  # no unlabeled image is ever drawn
    ],
)
def test_too_many_unreadable_unlabeled_images_are_an_error(project, broken, settings, stops):
    project.settings |= settings
    for i in range(broken):
        (project.unlabeled / f"000{i}.png").write_bytes(b"no image")
    errors = project.texts(Severity.ERROR)
    assert len(errors) == stops
    if stops:
        assert f"{broken} of 4 unlabeled images cannot be read, which is more" in errors[0]
