"""Tests of tools/export.py."""

from __future__ import annotations

import json
import sys

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model

import export
from locreweight.checkpoint.checkpointer import TeacherCheckpointer
from locreweight.checkpoint.safe_loading import write_safetensors
from locreweight.checkpoint.zoo import CONFIG, ENTRY, VARIABLE, ZooEntry, write_index
from locreweight.export.graph import OUTPUTS, largest_differences, load_onnx
from locreweight.file_io import sha256_of
from tests.export.decisive_model import SETTINGS, decisive_model
from tests.modeling.tiny_model import plain_config, random_image, tiny_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder with a checkpoint, its config and images; and the model."""
    folder = tmp_path_factory.mktemp("run")
    model, cfg = decisive_model(), tiny_config(SETTINGS)
    TeacherCheckpointer(model, str(folder)).save("model")
    (folder / CONFIG).write_text(cfg.dump())
    (folder / "images").mkdir()
    for i, size in enumerate([(60, 80), (90, 50)]):
        pixels = random_image(size, seed=i).permute(1, 2, 0).numpy()
        cv2.imwrite(str(folder / f"images/{i}.png"), np.ascontiguousarray(pixels))
    return folder, model


def main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
    export.main()


def test_export_writes_all_formats_and_compares_graphs(run, tmp_path, monkeypatch, capsys):
    folder, model = run
    main(
        monkeypatch,
        *("--weights", folder / "model.pth", "--images", folder / "images"),
        *("--torchscript", tmp_path / "new/mine.pt", "--onnx", tmp_path / "mine.onnx"),
        *("--detectron2", tmp_path / "mine"),
    )
    output = capsys.readouterr().out
    assert output.count("largest differences on 2 images of 2 sizes: boxes") == 2
    assert str(tmp_path / "mine.py") in output
    metadata = json.loads((tmp_path / "mine.onnx.json").read_text())
    assert metadata == json.loads((tmp_path / "new/mine.pt.json").read_text())
    assert metadata["class_names"] == ["class 0", "class 1", "class 2"]
    assert (metadata["shortest_side"], metadata["longest_side"]) == (96, 160)
    files = [str(folder / f"images/{i}.png") for i in range(2)]
    detector = export.load_detector(str(folder / "model.pth"), "")
    inputs = export.load_images(detector.cfg, files)
    assert [tuple(image.shape) for image in inputs] == [(3, 96, 128), (3, 160, 89)]
    graph = load_onnx(tmp_path / "mine.onnx")
    assert max(largest_differences(model, graph, inputs)) < 1e-3
    assert len(graph(inputs[0])) == len(OUTPUTS)


def test_export_takes_models_of_the_zoo(run, tmp_path, monkeypatch, capsys):
    folder, model = run
    entry = tmp_path / "zoo/small"
    entry.mkdir(parents=True)
    write_safetensors(
        entry / "a.safetensors",
        model.state_dict(),
        corner_coding=True,
        config=(folder / CONFIG).read_text(),
        class_names=["cat", "dog", "owl"],
    )
    (entry / CONFIG).write_bytes((folder / CONFIG).read_bytes())
    digests = {name: sha256_of(entry / name) for name in ("a.safetensors", CONFIG)}
    model_entry = ZooEntry("small", "a.safetensors", digests, ["cat", "dog", "owl"])
    (entry / ENTRY).write_text(model_entry.as_json())
    write_index(tmp_path / "zoo")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "zoo"))
    main(
        monkeypatch,
        *("--weights", "locreweight://small", "--images", folder / "images"),
        *("--torchscript", tmp_path / "mine.pt"),
    )
    assert "0.0e+00" in capsys.readouterr().out
    metadata = json.loads((tmp_path / "mine.pt.json").read_text())
    assert metadata["class_names"] == ["cat", "dog", "owl"]


@pytest.mark.parametrize("sigma, count", [(0.0, 0), (0.05, 1)])
def test_export_for_detectron2_warns_about_voting(sigma, count, run, tmp_path, monkeypatch, capsys):
    config = tmp_path / "config.yaml"
    cfg = tiny_config(SETTINGS | {"MODEL.ROI_BOX_HEAD.VOTING_SIGMA": sigma})
    config.write_text(cfg.dump())
    main(
        monkeypatch,
        *("--weights", run[0] / "model.pth", "--config-file", config),
        *("--detectron2", tmp_path / "mine"),
    )
    assert capsys.readouterr().out.count("VOTING_SIGMA") == count


def test_first_order_writes_a_yaml_config(run, tmp_path, monkeypatch):
    arguments = ["--weights", run[0] / "model.pth", "--detectron2", tmp_path / "mine"]
    main(monkeypatch, *arguments, "--first-order")
    assert {file.name for file in tmp_path.iterdir()} == {"mine.pkl", "mine.yaml"}
    cfg = get_cfg()
    cfg.merge_from_file(str(tmp_path / "mine.yaml"))
    assert cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"


def error_of(monkeypatch, *arguments):
    with pytest.raises(SystemExit) as exit_:
        main(monkeypatch, *arguments)
    return exit_.value.code


def test_invalid_arguments_raise_errors_of_one_line(run, tmp_path, monkeypatch, capsys):
    weights = run[0] / "model.pth"
    assert error_of(monkeypatch, "--weights", weights) == 2
    assert "nothing to write" in capsys.readouterr().err
    assert error_of(monkeypatch, "--weights", weights, "--onnx", tmp_path / "a.onnx") == 2
    assert "need --images" in capsys.readouterr().err
    onnx = ["--onnx", tmp_path / "a.onnx", "--images", tmp_path / "none"]
    assert error_of(monkeypatch, "--weights", weights, *onnx, "--count", 0) == 2
    assert "at least 1" in capsys.readouterr().err
    same = ["--torchscript", tmp_path / "a.onnx"]
    assert error_of(monkeypatch, "--weights", weights, *onnx, *same) == 2
    assert "name the same file" in capsys.readouterr().err
    for arguments, words in (
        (["--weights", tmp_path / "none.pth", *onnx], "none.pth' does not exist"),
        (["--weights", weights, *onnx], "no image"),
    ):
        error = error_of(monkeypatch, *arguments)
        assert error.startswith("error: ") and words in error and "\n" not in error


def test_missing_libraries_are_reported_before_anything_is_written(run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "onnxruntime" else name
    )
    both = ["--torchscript", tmp_path / "a.pt", "--onnx", tmp_path / "a.onnx"]
    arguments = ["--weights", run[0] / "model.pth", "--images", run[0] / "images", *both]
    error = error_of(monkeypatch, *arguments)
    assert error == "error: --onnx needs onnxruntime: pip install onnxruntime"
    assert not list(tmp_path.iterdir())


def test_plain_detectors_are_rejected(tmp_path, monkeypatch):
    cfg = tiny_config()
    torch.save({"model": build_model(plain_config(cfg)).state_dict()}, tmp_path / "plain.pth")
    (tmp_path / CONFIG).write_text(cfg.dump())
    arguments = ["--weights", tmp_path / "plain.pth", "--detectron2", tmp_path / "mine"]
    assert "is a plain Detectron2 detector" in error_of(monkeypatch, *arguments)
