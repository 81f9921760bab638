"""Checks before training: device, output folder, config and data."""

import logging
import multiprocessing
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from torch import distributed

import train_net
from locreweight.data.datasets.splits import split_indices
from locreweight.data.inspection.findings import Severity
from locreweight.engine import check_device, startup_checks
from locreweight.engine.startup_checks import lock_output_dir, log_effective_values
from locreweight.errors import UsageError
from tests.checked_data import Project
from tests.engine.tiny_training import TRAINING, restored_loggers_and_signals, training_config
from tests.modeling.tiny_model import tiny_config
from tests.tiny_data import edit_json

# --- device ---------------------------------------------------------------------------------------


@pytest.fixture
def pretend_machine(monkeypatch):
    """Pretends a number of GPUs and of processes."""

    def pretend(gpus, processes=1):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: processes)
        monkeypatch.setattr(distributed, "get_backend", lambda: "nccl" if gpus else "gloo")

    return pretend


@pytest.mark.parametrize(
    ("device", "gpus", "processes", "message"),
    [
        ("cuda", 0, 1, "no GPU here: add MODEL.DEVICE cpu"),
        ("cuda:1", 0, 1, "no GPU here"),
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


# --- output folder --------------------------------------------------------------------------------

FORK = multiprocessing.get_context("fork")


def hold(folder, pipe):
    """Lock the folder, and start a worker that outlives this process if it is killed."""
    lock_output_dir(folder)
    worker = os.fork()
    if not worker:
        time.sleep(600)
        os._exit(0)
    pipe.send(worker)
    time.sleep(600)


@pytest.fixture
def other_training(tmp_path):
    """Another process with a worker, which has locked the folder."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=hold, args=(tmp_path, theirs))
    process.start()
    assert ours.poll(60)
    worker = ours.recv()
    yield process
    process.kill()
    process.join()
    os.kill(worker, signal.SIGKILL)


def test_lock_rejects_the_folder_of_another_training(other_training, tmp_path):
    with pytest.raises(UsageError, match=f"another training is writing to .*{tmp_path.name}"):
        lock_output_dir(tmp_path)
    lock_output_dir(tmp_path / "other")


def test_second_training_ends_before_it_writes(other_training, datasets, tmp_path):
    cfg = training_config(datasets, tmp_path)
    (tmp_path / "config").write_text(cfg.dump())
    arguments = train_net.argument_parser().parse_args(["--config-file", str(tmp_path / "config")])
    with restored_loggers_and_signals(), pytest.raises(SystemExit) as exit_:
        train_net.launch(train_net.main, arguments)
    assert exit_.value.code.startswith("error: another training is writing")
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "config"}


def test_lock_ends_with_its_process_although_a_worker_survives(other_training, tmp_path):
    other_training.kill()
    other_training.join()
    lock_output_dir(tmp_path)


def test_lock_can_be_repeated_and_still_holds(tmp_path):
    for _ in range(2):
        lock_output_dir(tmp_path / "new/folder")

    def lock_in_other_process(pipe):
        # The fork has inherited the list of locks, but not the locks.
        pytest.MonkeyPatch().setattr("locreweight.engine.startup_checks._locks", {})
        try:
            lock_output_dir(tmp_path / "new/folder")
        except UsageError as error:
            pipe.send(str(error))

    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=lock_in_other_process, args=(theirs,))
    process.start()
    process.join()
    assert ours.poll() and "another training" in ours.recv()


def test_lock_warns_on_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.lockf", unsupported)
    lock_output_dir(tmp_path)
    assert "cannot check whether another training" in caplog.text


# --- effective values -----------------------------------------------------------------------------


@pytest.fixture
def log_of(caplog):
    """The log of the effective values of a config, with 5 labeled and 5 unlabeled images."""

    def log(settings=None):
        sets = SimpleNamespace(labeled=range(5), unlabeled=range(5))
        with caplog.at_level(logging.INFO, logger=startup_checks.__name__):
            log_effective_values(tiny_config(TRAINING | (settings or {})), sets)
        return caplog.text

    return log


def test_effective_values_are_logged(log_of):
    log = log_of({"SOLVER.IMS_PER_BATCH_UNLABELED": 3, "SOLVER.MAX_ITER": 12})
    for part in (
        "on 1 process(es)",
        "2 labeled + 3 unlabeled images per iteration (2 + 3 per process)",
        "learning rate 0.001",
        "12 iterations of which 2 burn-in",
        "4.8 epochs of 5 labeled",  # 12 * 2 / 5
        "6.0 epochs of 5 unlabeled",  # 10 * 3 / 5
    ):
        assert part in log


@pytest.mark.parametrize("burn_in", [3, 4])
def test_burn_in_without_end_gives_a_warning(log_of, burn_in):
    log = log_of({"SEMI.BURN_IN_ITERS": burn_in, "SOLVER.MAX_ITER": 4})
    assert ("unlabeled images are not used" in log) == (burn_in == 4)


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        ({}, ""),
        ({"MODEL.BACKBONE.FREEZE_AT": 2}, "set MODEL.BACKBONE.FREEZE_AT 0. "),
        ({"MODEL.RESNETS.NORM": "FrozenBN"}, "set MODEL.RESNETS.NORM BN. "),
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
