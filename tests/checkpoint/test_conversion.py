"""Checkpoints of other projects as a start, and one line on what they do not have."""

import logging

import pytest
import torch

from locreweight.checkpoint.checkpointer import CheckpointContents, TeacherCheckpointer
from locreweight.checkpoint.conversion import (
    corners_from_centers,
    describe_random_layers,
    select_teacher,
)
from locreweight.engine import load_for_evaluation
from tests.engine.tiny_training import same
from tests.modeling.tiny_model import plain_config, tiny_config, tiny_model

BOXES = "roi_heads.box_predictor.bbox_pred.weight"
VARIANCE = "roi_heads.box_predictor.log_variance"


@pytest.fixture
def plain_weights():
    """Of a detector made of Detectron2's classes."""
    return _plain(seed=1)


def _plain(seed):
    from detectron2.modeling import build_model

    torch.manual_seed(seed)
    return build_model(plain_config(tiny_config())).state_dict()


def test_the_teacher_is_taken_where_there_are_two():
    weights = {"modelTeacher.a": 1, "modelStudent.a": 2, "modelTeacher.b.modelTeacher.c": 3}
    assert select_teacher(weights) == {"a": 1, "b.modelTeacher.c": 3}
    assert select_teacher({"a": 1, "b": 2}) == {"a": 1, "b": 2}
    assert select_teacher({}) == {}


@pytest.fixture
def unbiased_teacher(plain_weights, tmp_path):
    """A file as Unbiased Teacher writes them."""
    student = _plain(seed=2)
    both = {f"modelTeacher.{name}": value for name, value in plain_weights.items()}
    both |= {f"modelStudent.{name}": value for name, value in student.items()}
    state = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.01}]}
    content = {"model": both, "optimizer": state, "scheduler": {"last_epoch": 9}, "iteration": 9}
    torch.save(content, tmp_path / "model_0000009.pth")
    return str(tmp_path / "model_0000009.pth")


def test_unbiased_teachers_teacher_starts_training(unbiased_teacher, plain_weights, caplog):
    model = tiny_model()
    checkpointer = TeacherCheckpointer(model)
    with caplog.at_level(logging.WARNING, logger="locreweight"):
        checkpointer.load(unbiased_teacher, checkpointables=[])
    assert checkpointer.contents is CheckpointContents.PLAIN_DETECTOR
    loaded = {n: v for n, v in model.state_dict().items() if not n.startswith(VARIANCE)}
    expected = plain_weights | {
        name: corners_from_centers(plain_weights[name])
        for name in plain_weights
        if ".bbox_pred." in name
    }
    assert same(loaded, expected)
    (line,) = [r.getMessage() for r in caplog.records if "initialized randomly" in r.message]
    assert line.endswith(f"missing in the file: {VARIANCE}")


def test_unbiased_teachers_teacher_is_evaluated_in_its_own_coding(unbiased_teacher, plain_weights):
    model = tiny_model()
    cfg = tiny_config({"MODEL.WEIGHTS": unbiased_teacher})
    assert load_for_evaluation(cfg, model) is CheckpointContents.PLAIN_DETECTOR
    assert torch.equal(model.state_dict()[BOXES], plain_weights[BOXES])


def test_layers_are_listed_once_in_one_line():
    line = describe_random_layers(["b.weight", "a.bias", "a.weight"], ["c.weight", "alone"])
    assert line.endswith("missing in the file: a, b; of another shape in the file: alone, c")
    assert describe_random_layers([], ["c.weight"]).endswith(
        "initialized randomly; of another shape in the file: c"
    )
