"""What is handed on does not say where it was made."""

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
    ],
)
def test_paths_that_lead_out_lose_all_but_their_end(text, expected):
    assert shareable(text) == expected


def test_values_of_every_kind_are_gone_through():
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
def test_commands_too(command, expected):
    assert shareable_command(command) == expected


def test_a_config_stays_what_it_was_but_for_its_paths():
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


def test_weights_that_everybody_has_stay_the_start():
    start = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
    assert shareable_config(tiny_config({"MODEL.WEIGHTS": start}), "a").MODEL.WEIGHTS == start
