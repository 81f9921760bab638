"""Tests of publishing a trained model, and of using it by name from a server."""

from __future__ import annotations

import getpass
import json
import logging
import math
import platform
import re
import shutil
import sys
from pathlib import Path

import cv2
import pytest
import torch
from detectron2.engine import default_argument_parser

import publish
import train_net
from locreweight import model_zoo
from locreweight.checkpoint.loading import read_score_threshold
from locreweight.checkpoint.safe_loading import read_safetensors
from locreweight.checkpoint.zoo import VARIABLE
from locreweight.data.training_sets import register_datasets
from locreweight.engine import SemiSupervisedTrainer
from locreweight.engine.predictor import Predictor
from locreweight.errors import UsageError
from locreweight.file_io import sha256_of
from locreweight.publish import PublishOptions, read_trained_model
from locreweight.publish import publish as publish_model
from tests.checkpoint.serving import serving
from tests.engine.tiny_training import (
    build_trainer,
    copy_of,
    detections_as_ground_truth,
    make_datasets,
    restored_loggers_and_signals,
    same,
    training_config,
)
from tests.modeling.tiny_model import BACKBONES, as_options
from tests.tiny_data import make_coco

LICENSE = "cc-by-4.0"


def command_line(config_file, *flags, **settings):
    """Call train_net.py in this process."""
    arguments = ["--config-file", str(config_file), *flags, *as_options(settings)]
    with restored_loggers_and_signals():
        return train_net.main(default_argument_parser().parse_args(arguments))


def keys(**settings):
    return {name.replace("__", "."): value for name, value in settings.items()}


@pytest.fixture(scope="module", params=["resnet", "timm_efficientnet", "timm_vit"])
def backbone(request):
    """Settings of a backbone."""
    return BACKBONES[request.param]


@pytest.fixture(scope="module")
def datasets(backbone, tmp_path_factory):
    """Data sets whose test set has an earlier teacher's detections as ground truth.

    Later teachers have an AP between 0 and 100 on it.
    """
    folder = tmp_path_factory.mktemp("data")
    names = make_datasets(folder)
    settings = backbone | {"SOLVER.MAX_ITER": 2}
    earlier = build_trainer(training_config(names, folder / "earlier", settings))
    earlier.train()
    test_set = detections_as_ground_truth(
        earlier.teacher, names["DATASETS.TEST"][0], folder / "detections.json"
    )
    return names | {"DATASETS.TEST": [test_set]}


@pytest.fixture(scope="module")
def run(datasets, backbone, tmp_path_factory):
    """Output folder of a run that was evaluated twice, and its trainer."""
    output = tmp_path_factory.mktemp("jane") / "tiny.v1"
    settings = backbone | {"DATASETS.TEST": datasets["DATASETS.TEST"], "TEST.EVAL_PERIOD": 2}
    cfg = training_config(datasets, output, settings)
    register_datasets(cfg)
    torch.manual_seed(cfg.SEED)
    output.mkdir()
    (output / "config.yaml").write_text(cfg.dump())
    trainer = SemiSupervisedTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    return output, trainer


@pytest.fixture(scope="module")
def zoo(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo")
    options = PublishOptions("tiny/v1", license=LICENSE, description="Made for tests.", pickle=True)
    publish_model(read_trained_model(run[0], last=True), folder, options)
    return folder


@pytest.fixture
def served(zoo, monkeypatch, tmp_path):
    with serving(zoo) as server:
        monkeypatch.setenv(VARIABLE, server.address)
        monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
        yield server


# --- from a run to a server and back --------------------------------------------------------------


def test_evaluation_of_the_published_model_equals_the_metrics_of_the_training(
    run, served, tmp_path
):
    lines = map(json.loads, (run[0] / "metrics.json").read_text().splitlines())
    *_, trained = (line for line in lines if "bbox/AP" in line)
    results = command_line(
        "locreweight://tiny/v1.yaml",
        "--eval-only",
        **keys(MODEL__WEIGHTS="locreweight://tiny/v1", OUTPUT_DIR=tmp_path),
        **{"DATASETS.TEST": run[1].cfg.DATASETS.TEST},
    )
    published = model_zoo.describe("tiny/v1").metrics
    assert 0 < trained["bbox/AP"] < 100 and trained["bbox/AP"] != trained["student/bbox/AP"]
    assert len(published) > 5
    for name, value in published.items():
        assert value == trained[name] == results["bbox"][name.removeprefix("bbox/")], name


def test_model_zoo_get_builds_the_published_model(run, served):
    model = model_zoo.get("tiny/v1.yaml", trained=True)
    assert same(model.state_dict(), copy_of(run[1].teacher))
    assert model.training
    assert model_zoo.get_config("tiny/v1", trained=True).MODEL.WEIGHTS == "locreweight://tiny/v1"
    torch.manual_seed(5)
    assert not same(model_zoo.get("tiny/v1").state_dict(), model.state_dict())


def test_predictor_takes_the_address_of_a_model(run, served):
    detector = Predictor("locreweight://tiny/v1", device="cpu")
    assert detector.class_names == ["cat", "dog", "owl"] and detector.has_localization_quality
    assert same(detector.model.state_dict(), copy_of(run[1].teacher))


def test_training_with_other_classes_keeps_all_other_layers(
    run, served, backbone, tmp_path, caplog
):
    """One log line names the layers that depend on the classes."""
    labeled = make_coco(tmp_path / "labeled", images=3, classes=("ant", "bee"))
    settings = backbone | {
        "MODEL.WEIGHTS": "locreweight://tiny/v1",
        "MODEL.ROI_HEADS.NUM_CLASSES": 2,
        "DATASETS.TRAIN": ["coco:{}:{}".format(*labeled)],
    }
    cfg = training_config({}, tmp_path / "output", settings | {"SEMI.BURN_IN_ITERS": 1})
    cfg.SOLVER.MAX_ITER = 1
    with caplog.at_level(logging.WARNING, logger="locreweight"):
        trainer = build_trainer(cfg)
    (line,) = [r.getMessage() for r in caplog.records if "initialized randomly" in r.getMessage()]
    layers = [
        f"roi_heads.box_predictor.{name}" for name in ("bbox_pred", "cls_score", "log_variance")
    ]
    assert line.endswith(f"of another shape in the file: {', '.join(layers)}")
    teacher, before = trainer.teacher.state_dict(), run[1].teacher.state_dict()
    changed = {name for name in teacher if not torch.equal(teacher[name], before[name])}
    assert {name.rpartition(".")[0] for name in changed} == set(layers)
    assert same(trainer.student.state_dict(), teacher)
    trainer.train()
    assert trainer.iter == 1


def test_changed_weight_file_is_rejected(run, zoo, monkeypatch, tmp_path):
    copied = shutil.copytree(zoo, tmp_path / "zoo")
    monkeypatch.setenv(VARIABLE, str(copied))
    (file,) = copied.rglob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UsageError, match="damaged or not the file that was published"):
        model_zoo.get("tiny/v1", trained=True)


# --- published files ------------------------------------------------------------------------------


def test_publish_writes_all_files_of_an_entry(run, zoo):
    folder = zoo / "tiny/v1"
    (weights,) = folder.glob("*.safetensors")
    (pickled,) = folder.glob("*.pkl")
    assert weights.name == f"model_final_{sha256_of(weights)[:8]}.safetensors"
    assert pickled.name == f"detectron2_{sha256_of(pickled)[:8]}.pkl"
    assert {file.name for file in folder.iterdir()} == {
        "README.md", "config.yaml", "detections.jpg", "detectron2.py", "model.json",
        weights.name, pickled.name,
    }  # fmt: skip
    assert pickled.name in (folder / "detectron2.py").read_text()
    assert cv2.imread(str(folder / "detections.jpg")).shape[1] > 300
    (listed,) = json.loads((zoo / "index.json").read_text())["models"]
    assert listed == json.loads((folder / "model.json").read_text())
    assert (listed["license"], listed["iterations"]) == (LICENSE, 4)
    assert listed["class_names"] == ["cat", "dog", "owl"]
    card, page = (folder / "README.md").read_text(), (zoo / "README.md").read_text()
    metrics = listed["metrics"]
    for part in (LICENSE, "cat, dog, owl", weights.name, f"{metrics['bbox/AP']:.2f}"):
        assert part in card and part in page
    for part in ("Made for tests.", "train_net.py", "detections.jpg", f"license: {LICENSE}\n"):
        assert part in card
    assert not [file for file in zoo.rglob(".*")]
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o644}


def test_published_weights_have_the_score_threshold(run, zoo):
    (file,) = zoo.rglob("*.safetensors")
    threshold = read_trained_model(run[0], last=True).metrics["bbox/F1-threshold"]
    assert 0 < threshold < 1
    assert read_score_threshold(str(file)) == threshold
    assert Predictor(str(file), device="cpu").score_threshold == threshold


def test_published_weights_contain_only_the_teacher(run, zoo):
    (file,) = zoo.rglob("*.safetensors")
    content = read_safetensors(str(file))
    assert same(content["model"], copy_of(run[1].teacher))
    assert not same(content["model"], copy_of(run[1].student))
    fields = {"corner_coding", "config", "class_names", "score_threshold"}
    assert set(content) == {"model"} | fields
    size = sum(value.nbytes for value in content["model"].values())
    assert file.stat().st_size < size + 50_000


def test_published_files_contain_nothing_private(run, datasets, zoo):
    """They contain neither folders of run, data and home, nor names of the user and host."""
    folders = {str(Path.home()), str(run[0].parent), "jane", sys.prefix, "/tmp", "/home"}
    folders |= {
        str(Path(name.split(":")[1]).parent) for names in datasets.values() for name in names
    }
    people = {getpass.getuser(), platform.node()}
    files = [file for file in zoo.rglob("*") if file.is_file()]
    assert len(files) == 9
    for file in files:
        content = file.read_bytes()
        in_text = file.suffix in {".yaml", ".json", ".md", ".py"}
        # Binary files contain sequences of four bytes by chance.
        for word in (folder.encode() for folder in folders if in_text or len(folder) > 5):
            assert word not in content, f"{word} in {file}"
        for name in (re.escape(name.encode()) for name in people if in_text):
            assert not re.search(rb"\b" + name + rb"\b", content), f"{name} in {file}"


def test_publishing_a_run_again_writes_the_same_files(run, zoo, tmp_path):
    publish_model(
        read_trained_model(run[0], last=True), tmp_path, PublishOptions("tiny/v1", license=LICENSE)
    )
    for name in ("config.yaml", "detections.jpg"):
        assert (tmp_path / "tiny/v1" / name).read_bytes() == (zoo / "tiny/v1" / name).read_bytes()
    names = [[file.name for file in folder.rglob("*.safetensors")] for folder in (tmp_path, zoo)]
    assert names[0] == names[1]


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("last", "name"), [(False, "model_best.pth"), (True, "model_final.pth")])
def test_metrics_belong_to_the_published_checkpoint(run, tmp_path, last, name):
    output = shutil.copytree(run[0], tmp_path / "output")
    best = torch.load(output / "model_best.pth", weights_only=True)
    best["trainer"]["iteration"] = 1
    torch.save(best, output / "model_best.pth")
    evaluations = [(1, 30.0), (2, 20.0), (3, 10.0)]  # after two, three and all four iterations
    lines = [
        {"iteration": i, "bbox/AP": ap, "bbox/APl": math.nan, "student/bbox/AP": 1.0, "lr": 0.1}
        for i, ap in evaluations
    ]
    (output / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    trained = read_trained_model(output, last=last)
    assert trained.checkpoint.name == name
    assert trained.iterations == (4 if last else 2)
    assert trained.metrics == {"bbox/AP": 10.0 if last else 30.0}


def test_run_without_evaluations_has_no_metrics(run, tmp_path):
    output = shutil.copytree(run[0], tmp_path / "output")
    (output / "metrics.json").write_text('{"iteration": 1, "total_loss": 1.0}\n')
    entry = publish_model(
        read_trained_model(output), tmp_path / "zoo", PublishOptions("a", pictures=0)
    )
    assert entry.metrics == {}
    card = (tmp_path / "zoo/a/README.md").read_text()
    assert "Not evaluated." in card and "detections.jpg" not in card
    assert "not stated" in card and "license:" not in card


def test_metrics_ignore_an_incomplete_last_line(run, tmp_path):
    output = shutil.copytree(run[0], tmp_path / "output")
    with (output / "metrics.json").open("a") as file:
        file.write('{"iteration": 3, "bbox/')
    assert read_trained_model(output).metrics == read_trained_model(run[0]).metrics


def test_command_and_versions_of_the_run_are_published(run, tmp_path):
    output = shutil.copytree(run[0], tmp_path / "output")
    start = {
        "command": "python train_net.py --config-file /home/jane/mine.yaml SEED 3",
        "commit": "0123456789ab",
        "started": "2000-01-01T00:00:00",
        "processes": 1,
        "versions": {"PyTorch": "2.0"},
        "machine": {"CPU": "jane's"},
    }
    (output / "run.json").write_text(json.dumps([start, start | {"command": "resumed"}]))
    entry = publish_model(
        read_trained_model(output), tmp_path / "zoo", PublishOptions("a", pictures=0)
    )
    assert entry.training_command == "python train_net.py --config-file mine.yaml SEED 3"
    assert entry.versions == {"PyTorch": "2.0", "commit": "0123456789ab"}
    assert "jane" not in (tmp_path / "zoo/a/README.md").read_text()


def test_publish_replaces_an_entry_only_with_the_option(run, tmp_path):
    trained = read_trained_model(run[0])
    publish_model(trained, tmp_path, PublishOptions("a", pictures=0))
    (tmp_path / "a/old").touch()
    with pytest.raises(UsageError, match=r"already has 'a': use another --name, or add --replace"):
        publish_model(trained, tmp_path, PublishOptions("a", pictures=0))
    publish_model(trained, tmp_path, PublishOptions("a", pictures=0, replace=True))
    assert not (tmp_path / "a/old").exists()
    publish_model(trained, tmp_path, PublishOptions("b", pictures=0))
    assert [m["name"] for m in json.loads((tmp_path / "index.json").read_text())["models"]] == [
        "a",
        "b",
    ]


@pytest.mark.parametrize(("first", "second"), [("a", "a/b"), ("a/b", "a"), ("a/b", "a/b/c/d")])
def test_publish_rejects_nested_entries(run, tmp_path, first, second):
    """Replacing the outer entry would delete the inner one."""
    trained = read_trained_model(run[0])
    publish_model(trained, tmp_path, PublishOptions(first, pictures=0))
    with pytest.raises(UsageError, match=f"'{second}' and the model in {tmp_path / first} would"):
        publish_model(trained, tmp_path, PublishOptions(second, pictures=0, replace=True))


def test_publish_rejects_folders_that_are_not_zoos(run, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    for zoo, words in (
        (tmp_path, "neither empty nor a model zoo"),
        ("http://a/zoo", "is not a folder"),
    ):
        with pytest.raises(UsageError, match=words):
            publish_model(read_trained_model(run[0]), Path(zoo), PublishOptions("a", pictures=0))
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]


# --- command line ---------------------------------------------------------------------------------


def error_of(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["publish.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        publish.main()
    assert "\n" not in exit_.value.code
    return exit_.value.code


def test_invalid_arguments_raise_errors_of_one_line(run, tmp_path, monkeypatch):
    zoo = tmp_path / "zoo"
    assert "is not the OUTPUT_DIR of a run" in error_of(monkeypatch, tmp_path, "--to", zoo)
    output = shutil.copytree(run[0], tmp_path / "output")
    assert "is not a valid model name" in error_of(
        monkeypatch, output, "--to", zoo, "--name", "../a"
    )
    assert "--pictures is -1" in error_of(monkeypatch, output, "--to", zoo, "--pictures", "-1")
    a_file = tmp_path / "file"
    a_file.touch()
    for inside in (a_file, a_file / "zoo"):
        assert f"{a_file} is a file" in error_of(monkeypatch, output, "--to", inside)
    best = output / "model_best.pth"
    content = torch.load(best, weights_only=True)
    first = next(iter(content["model"]))
    content["model"][first][..., 0] = torch.nan
    torch.save(content, best)
    assert f"infinite or NaN, such as {first}" in error_of(monkeypatch, output, "--to", zoo)
    torch.save({"model": content["model"]}, best)
    assert "has no teacher and student" in error_of(monkeypatch, output, "--to", zoo)
    best.write_text("not weights")
    assert "model_best.pth is not a checkpoint" in error_of(monkeypatch, output, "--to", zoo)
    for file in [*output.glob("*.pth"), output / "last_checkpoint"]:
        file.unlink()
    assert "has no checkpoint" in error_of(monkeypatch, output, "--to", zoo)
    assert not zoo.exists()


def test_unknown_class_names_are_reported(run, tmp_path, monkeypatch):
    output = shutil.copytree(run[0], tmp_path / "output")
    content = torch.load(output / "model_best.pth", weights_only=True)
    content.pop("class_names")
    torch.save(content, output / "model_best.pth")
    text = (output / "config.yaml").read_text()
    (output / "config.yaml").write_text(text.replace(".json", ".gone"))
    assert "does not contain its class names" in error_of(
        monkeypatch, output, "--to", tmp_path / "zoo"
    )


def test_command_prints_what_it_wrote(run, tmp_path, monkeypatch, capsys):
    arguments = ["publish.py", str(run[0]), "--to", str(tmp_path / "zoo"), "--pictures", "1"]
    monkeypatch.setattr(sys, "argv", arguments)
    publish.main()
    output = capsys.readouterr().out
    assert str(tmp_path / "zoo/tiny.v1") in output and "model_best_" in output
    assert "without a license" in output and "may be published" in output
