"""Published configs and commands contain no private paths."""

import pytest

from locreweight.checkpoint.sharing import shareable, shareable_command, shareable_config
from tests.modeling.tiny_model import tiny_config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("LocReweight", "LocReweight"),
        ("output/mine", "output/mine"),
        ("/home/jane/runs/mine", "mine"),
        ("/home/jane/runs/mine/", "mine"),
        ("~/runs/mine", "mine"),
        ("~jane/mine", "mine"),
        ("../../jane/mine", "mine"),
        ("data/../../jane/mine", "mine"),
        ("coco:data/a.json:data/a", "coco:data/a.json:data/a"),
        ("coco:/home/jane/a.json:/home/jane/a b", "coco:a.json:a b"),
        ("folder:/mnt/jane's disk/photos", "folder:photos"),
        ("list:/mnt/jane/index.txt:/mnt/jane/photos", "list:index.txt:photos"),
        ("detectron2://ImageNetPretrained/MSRA/R-50.pkl",) * 2,
        ("https://jane:secret@intern.example.org/models/a.pth?key=jane", "a.pth"),
        ("file:///home/jane/a.pth", "a.pth"),
        ("coco_2017_val", "coco_2017_val"),
        ("shards:s3://bucket/jane/index.json", "shards:index.json"),
        ("coco:/home/jane/a.json:s3://bucket/jane/images", "coco:a.json:images"),
        ("coco:s3://b/jane/a.json:s3://b/jane/images", "coco:a.json:images"),
        ("coco:s3://jane:secret@b:9000/a.json:/home/jane/images", "coco:a.json:images"),
        ("coco:s3://b/a.json:~/images", "coco:a.json:images"),
        ("shards:s3://jane:secret@host", "shards:"),
        ("shards:s3://jane:secret@host/", "shards:"),
        ("https://jane:secret@host?key=/jane:/secret", ""),
        ("shards:s3://bucket/jane:x/i.json", "shards:i.json"),
    ],
)
def test_shareable_reduces_outside_paths_to_their_last_part(text, expected):
    assert shareable(text) == expected


def test_shareable_processes_nested_values():
    value = {"a": ["/x/y", ("~/z", 3)], "b": {"c": "/x/y"}, "d": None, "e": 0.5, "f": True}
    shared = {"a": ["y", ("z", 3)], "b": {"c": "y"}, "d": None, "e": 0.5, "f": True}
    assert shareable(value) == shared


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (
            "python train_net.py --config-file /home/jane/c.yaml --num-gpus 2 SEED 1",
            "python train_net.py --config-file c.yaml --num-gpus 2 SEED 1",
        ),
        (
            """python train_net.py DATASETS.TRAIN "('coco:/home/jane/a.json:/home/jane/a',)" """,
            """python train_net.py DATASETS.TRAIN '('"'"'coco:a.json:a'"'"',)'""",
        ),
        ("python a.py --config-file=/home/jane/c.yaml", "python a.py --config-file=c.yaml"),
        ("python a.py OUTPUT_DIR '/my files/mine' A 1e-3", "python a.py OUTPUT_DIR mine A 1e-3"),
    ],
)
def test_shareable_command_reduces_paths_of_arguments(command, expected):
    assert shareable_command(command) == expected


def test_shareable_config_changes_only_paths():
    settings = {
        "DATASETS.TRAIN": ["coco:/home/jane/a.json:/home/jane/a"],
        "MODEL.WEIGHTS": "/home/jane/start.pth",
        "OUTPUT_DIR": "/home/jane/output",
    }
    cfg = tiny_config(settings)
    shared = shareable_config(cfg, "cells/small")
    assert list(shared.DATASETS.TRAIN) == ["coco:a.json:a"]
    assert (shared.OUTPUT_DIR, shared.MODEL.WEIGHTS) == ("output/small", "")
    assert cfg.OUTPUT_DIR == "/home/jane/output"
    for key in ("TRAIN", "TEST"):
        shared.DATASETS[key] = cfg.DATASETS[key]
    shared.OUTPUT_DIR, shared.MODEL.WEIGHTS = cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS
    assert shared == cfg


@pytest.mark.parametrize(("start", "expected"), [("hub", "hub"), ("/home/jane/start.pth", "")])
def test_shareable_config_keeps_only_public_weights_of_timm(start, expected):
    cfg = tiny_config({"MODEL.TIMM.PRETRAINED": start})
    assert shareable_config(cfg, "a").MODEL.TIMM.PRETRAINED == expected


def test_shareable_config_keeps_public_weights():
    start = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
    assert shareable_config(tiny_config({"MODEL.WEIGHTS": start}), "a").MODEL.WEIGHTS == start
