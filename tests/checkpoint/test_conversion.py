"""Tests of weights of other projects: selected models, box coding, layers that are missing."""

import logging

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from torch.testing import assert_close

from locreweight.checkpoint.checkpointer import CheckpointContents, TeacherCheckpointer
from locreweight.checkpoint.conversion import (
    corners_from_centers,
    describe_random_layers,
    select_teacher,
)
from locreweight.engine import load_for_evaluation
from locreweight.modeling import CornerBoxTransform
from tests.engine.tiny_training import same
from tests.modeling.tiny_model import plain_config, tiny_config, tiny_model

BOXES = "roi_heads.box_predictor.bbox_pred.weight"
VARIANCE = "roi_heads.box_predictor.log_variance"


@pytest.fixture
def plain_weights():
    """Weights of a plain Detectron2 detector."""
    return random_plain_weights(seed=1)


def random_plain_weights(seed):
    torch.manual_seed(seed)
    return build_model(plain_config(tiny_config())).state_dict()


def test_select_teacher_returns_the_teacher_of_two_models():
    weights = {"modelTeacher.a": 1, "modelStudent.a": 2, "modelTeacher.b.modelTeacher.c": 3}
    assert select_teacher(weights) == {"a": 1, "b.modelTeacher.c": 3}
    assert select_teacher({"a": 1, "b": 2}) == {"a": 1, "b": 2}
    assert select_teacher({}) == {}


@pytest.fixture
def unbiased_teacher(plain_weights, tmp_path):
    """A checkpoint in the format of Unbiased Teacher."""
    student = random_plain_weights(seed=2)
    both = {f"modelTeacher.{name}": value for name, value in plain_weights.items()}
    both |= {f"modelStudent.{name}": value for name, value in student.items()}
    state = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.01}]}
    content = {"model": both, "optimizer": state, "scheduler": {"last_epoch": 9}, "iteration": 9}
    torch.save(content, tmp_path / "model_0000009.pth")
    return str(tmp_path / "model_0000009.pth")


def test_training_starts_from_the_teacher_of_unbiased_teacher(
    unbiased_teacher, plain_weights, caplog
):
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


def test_teacher_of_unbiased_teacher_is_evaluated_with_its_box_coding(
    unbiased_teacher, plain_weights
):
    model = tiny_model()
    cfg = tiny_config({"MODEL.WEIGHTS": unbiased_teacher})
    assert load_for_evaluation(cfg, model) is CheckpointContents.PLAIN_DETECTOR
    assert torch.equal(model.state_dict()[BOXES], plain_weights[BOXES])


def test_describe_random_layers_lists_each_layer_once():
    line = describe_random_layers(["b.weight", "a.bias", "a.weight"], ["c.weight", "alone"])
    assert line.endswith("missing in the file: a, b; of another shape in the file: alone, c")
    assert describe_random_layers([], ["c.weight"]).endswith(
        "initialized randomly; of another shape in the file: c"
    )


# --- box coding -----------------------------------------------------------------------------------


def random_boxes(count=20):
    corner = torch.rand(count, 2) * 30
    return torch.cat([corner, corner + 10 + torch.rand(count, 2) * 20], dim=1)


def decode_both(deltas, boxes):
    """Boxes decoded from converted deltas by corners, and from the deltas by Detectron2."""
    corners = corners_from_centers(deltas.T).T
    converted = CornerBoxTransform((10.0, 10.0)).apply_deltas(corners, boxes)
    return converted, Box2BoxTransform((10.0, 10.0, 5.0, 5.0)).apply_deltas(deltas, boxes)


def test_corners_from_centers_is_exact_for_shifts():
    deltas, boxes = torch.randn(20, 8), random_boxes()
    deltas.unflatten(1, (2, 4))[..., 2:] = 0
    converted, expected = decode_both(deltas, boxes)
    assert_close(converted, expected, rtol=1e-5, atol=1e-4)
    assert (expected - boxes.repeat(1, 2)).abs().max() > 1


def test_corners_from_centers_is_of_first_order_for_changes_of_size():
    """Half the change has a quarter of the error."""
    deltas, boxes = torch.randn(20, 4).double(), random_boxes()
    deltas[:, :2] = 0

    def error_and_change(scale):
        converted, expected = decode_both(scale * deltas, boxes)
        return (converted - expected).abs().max().item(), (expected - boxes).abs().max().item()

    whole, _ = error_and_change(1.0)
    half, change = error_and_change(0.5)
    assert half / whole == pytest.approx(1 / 4, rel=0.15)
    assert 0 < half < change / 5


def test_corners_from_centers_converts_a_layer_like_its_outputs():
    layer, x = torch.nn.Linear(16, 12).double(), torch.randn(5, 16).double()
    converted = torch.nn.Linear(16, 12).double()
    with torch.no_grad():
        converted.weight.copy_(corners_from_centers(layer.weight))
        converted.bias.copy_(corners_from_centers(layer.bias))
    dx, dy, dw, dh = layer(x).unflatten(1, (3, 4)).unbind(2)
    expected = torch.stack([dx - dw, dy - dh, dx + dw, dy + dh], dim=2).flatten(1)
    assert_close(converted(x), expected)
