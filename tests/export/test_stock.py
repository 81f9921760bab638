"""Plain Detectron2 loads the exported detectors and detects the same boxes."""

import itertools
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling.box_regression import Box2BoxTransform, Box2BoxTransformLinear

from locreweight.checkpoint.conversion import corners_from_centers
from locreweight.export.stock import (
    convert_box_branch,
    stock_config,
    stock_weights,
    write_stock_detector,
)
from locreweight.modeling.box_coding import CornerBoxTransform
from tests.export.decisive_model import SETTINGS, decisive_model
from tests.modeling.tiny_model import BACKBONES, random_image, tiny_config

# Script of a user who does not have this package.
USER_SCRIPT = """
import sys
sys.modules["locreweight"] = None
import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.modeling import build_model

try:
    import locreweight
except ImportError:
    pass
else:
    raise AssertionError("locreweight can be imported")
images, output, *files = sys.argv[1:]
outputs = {}
for weights, config in zip(files[::2], files[1::2]):
    if config.endswith(".py"):
        model = instantiate(LazyConfig.load(config).model)
    else:
        cfg = get_cfg()
        cfg.merge_from_file(config)
        cfg.MODEL.DEVICE = "cpu"
        model = build_model(cfg)
    DetectionCheckpointer(model).load(weights)
    assert type(model).__name__ == "GeneralizedRCNN"
    assert type(model.roi_heads).__name__ == "StandardROIHeads"
    model.eval()
    for i, image in enumerate(np.load(images).values()):
        inputs = {"image": torch.from_numpy(image), "height": 100, "width": 120}
        with torch.no_grad():
            instances = model([inputs])[0]["instances"].to("cpu")
        outputs[f"{config} boxes {i}"] = instances.pred_boxes.tensor.numpy()
        outputs[f"{config} scores {i}"] = instances.scores.numpy()
        outputs[f"{config} classes {i}"] = instances.pred_classes.numpy()
np.savez(output, **outputs)
"""
IMAGES = [random_image(size, seed=i) for i, size in enumerate([(64, 64), (96, 71), (50, 130)])]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Models and exported files by name, and what a process without this package detects with them.

    The detections are ``(boxes, scores, classes)`` per image.
    """
    folder = tmp_path_factory.mktemp("exported")
    models, files = {}, {}
    for name, corners, backbone in (
        ("corners", True, "resnet"),
        ("centers.v1", False, "resnet"),
        ("efficientnet", True, "timm_efficientnet"),
        ("convnext", False, "timm_convnext"),
        ("vit", True, "timm_vit"),
    ):
        settings = SETTINGS | {"MODEL.ROI_BOX_HEAD.CORNER_CODING": corners} | BACKBONES[backbone]
        models[name] = decisive_model(settings)
        weights = models[name].state_dict()
        cfg = tiny_config(settings)
        cfg.freeze()
        files[name] = write_stock_detector(folder / name, cfg, weights)
    np.savez(folder / "images.npz", *[image.numpy() for image in IMAGES])
    paths = [folder / "images.npz", folder / "outputs.npz", *itertools.chain(*files.values())]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", USER_SCRIPT, *map(str, paths)],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    log = done.stderr + done.stdout
    assert "not found in" not in log and "incompatible" not in log  # the weights fit the model
    loaded = np.load(folder / "outputs.npz")
    parts = ("boxes", "scores", "classes")
    detections = {
        name: [[loaded[f"{config} {part} {i}"] for part in parts] for i in range(len(IMAGES))]
        for name, (_, config) in files.items()
    }
    return models, files, detections


@torch.no_grad()
def detect(model):
    outputs = [model([{"image": image, "height": 100, "width": 120}])[0] for image in IMAGES]
    return [
        [i.pred_boxes.tensor.numpy(), i.scores.numpy(), i.pred_classes.numpy()]
        for i in (output["instances"] for output in outputs)
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("corners", ["corners.pkl", "corners.py"]),
        ("centers.v1", ["centers.v1.pkl", "centers.v1.yaml"]),
        ("efficientnet", ["efficientnet.pkl", "efficientnet.py"]),
        ("convnext", ["convnext.pkl", "convnext.py"]),
        ("vit", ["vit.pkl", "vit.py"]),
    ],
)
def test_plain_detectron2_detects_the_same(exported, name, expected):
    """The Python config contains what Detectron2 lacks: the box coding, or a timm backbone."""
    models, files, detections = exported
    assert [file.name for file in files[name]] == expected
    for ours, theirs in zip(detect(models[name]), detections[name], strict=True):
        assert len(ours[0]) > 5
        np.testing.assert_allclose(theirs[0], ours[0], rtol=0, atol=1e-4)
        np.testing.assert_array_equal(theirs[1], ours[1])
        np.testing.assert_array_equal(theirs[2], ours[2])


def test_write_stock_detector_first_order_converts_the_box_branch(tmp_path):
    model, cfg = decisive_model(), tiny_config(SETTINGS)
    weights, config = write_stock_detector(
        tmp_path / "mine", cfg, model.state_dict(), first_order=True
    )
    assert config.name == "mine.yaml"
    written = get_cfg()
    written.merge_from_file(str(config))
    assert written.MODEL.WEIGHTS == weights.name
    expected = convert_box_branch(
        stock_weights(model.state_dict()), tuple(cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS)
    )
    arrays = pickle.loads(weights.read_bytes())["model"]
    assert arrays.keys() == expected.keys()
    assert all(np.array_equal(arrays[name], expected[name].numpy()) for name in expected)


# --- conversion of the box branch to first order --------------------------------------------------

BRANCH = "roi_heads.box_predictor.bbox_pred."
BOXES = torch.tensor([[10.0, 20.0, 50.0, 40.0], [0.0, 0.0, 8.0, 30.0]])


def decoded(layer, features, boxes, transform):
    deltas = features @ layer[BRANCH + "weight"].T + layer[BRANCH + "bias"]
    return transform.apply_deltas(deltas, boxes)


def branch(seed=0, size=1.0, classes=3):
    generator = torch.Generator().manual_seed(seed)
    return {
        BRANCH + "weight": size * torch.randn(classes * 4, 8, generator=generator),
        BRANCH + "bias": size * torch.randn(classes * 4, generator=generator),
    }


@pytest.mark.parametrize("factors", [(10.0, 10.0, 5.0, 5.0), (8.0, 4.0, 3.0, 7.0)])
def test_convert_box_branch_error_is_the_remainder_of_the_exponential(factors):
    """Where the width grows by ``w * s``, sides are ``w * (exp(s) - 1 - s) / 2`` too far out."""
    features, layer = torch.randn(2, 8), branch(size=0.3)
    ours = decoded(layer, features, BOXES, CornerBoxTransform(factors[:2]))
    converted = convert_box_branch(layer, factors)
    theirs = decoded(converted, features, BOXES, Box2BoxTransform(weights=factors))
    old, new = (b.unflatten(1, (-1, 2, 2)).diff(dim=2) for b in (BOXES, ours))
    growth = new / old - 1
    assert growth.abs().max() > 0.1
    remainder = old * (growth.expm1() - growth) / 2
    expected = torch.cat([-remainder, remainder], dim=2).flatten(1)
    torch.testing.assert_close(theirs - ours, expected, rtol=0, atol=1e-4)


def test_convert_box_branch_is_exact_for_shifts():
    layer = branch(size=0.5)
    for name in layer:  # both corners move by the same offset
        rows = layer[name].unflatten(0, (-1, 2, 2))
        layer[name] = rows[:, :1].expand_as(rows).flatten(0, 2)
    features, factors = torch.randn(2, 8), (10.0, 10.0, 5.0, 5.0)
    ours = decoded(layer, features, BOXES, CornerBoxTransform())
    converted = convert_box_branch(layer, factors)
    theirs = decoded(converted, features, BOXES, Box2BoxTransform(weights=factors))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_convert_box_branch_inverts_corners_from_centers():
    layer = branch()
    corners = {name: corners_from_centers(value) for name, value in layer.items()}
    back = convert_box_branch(corners, (10.0, 10.0, 5.0, 5.0))
    for name in layer:
        torch.testing.assert_close(back[name], layer[name])


def test_box2box_transform_linear_differs_once_a_side_passes_the_center():
    """The export does not use this class of Detectron2, even though it is linear in the sides."""
    linear = Box2BoxTransformLinear()
    assert not hasattr(linear, "weights")  # which ROI heads read
    for offsets, same in (([1.0, -2.0, 3.0, 1.0], True), ([6.0, 0.0, 1.0, 0.0], False)):
        deltas = torch.tensor([offsets, offsets])
        sides = 0.5 + deltas / 10 * torch.tensor([-1.0, -1.0, 1.0, 1.0])
        ours = CornerBoxTransform().apply_deltas(deltas, BOXES)
        assert torch.allclose(ours, linear.apply_deltas(sides, BOXES)) == same


# --- the config -----------------------------------------------------------------------------------


def test_stock_config_has_only_keys_of_detectron2():
    settings = SETTINGS | {"DATASETS.TRAIN": ["coco:/home/jane/a.json:/home/jane/a"]}
    config = stock_config(tiny_config(settings))
    fresh = get_cfg()
    fresh.merge_from_other_cfg(config)  # raises on unknown keys
    assert fresh.MODEL.RESNETS.STEM_OUT_CHANNELS == 16
    assert fresh.MODEL.DEVICE == get_cfg().MODEL.DEVICE != tiny_config(settings).MODEL.DEVICE
    assert "jane" not in config.dump()


def test_python_config_does_not_execute_values_of_the_config(tmp_path):
    """Configs of zoos and checkpoints may come from untrusted authors."""
    text = '"""; raise SystemExit("ran"); """'
    cfg = tiny_config(SETTINGS)
    cfg.SOLVER.LR_SCHEDULER_NAME = text
    cfg.INPUT.RANDOM_FLIP = "C:\\new \x07"
    _, config_file = write_stock_detector(tmp_path / "mine", cfg, {})
    scope = {"__name__": "mine"}
    exec(config_file.read_text(), scope)
    assert scope["CONFIG"] == "\n" + stock_config(cfg).dump()
