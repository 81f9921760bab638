"""Detectron2 alone reads what is exported for it, and finds the same boxes."""

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
from tests.modeling.tiny_model import random_image, tiny_config

# As a stranger would write it, who has no locreweight.
STRANGER = """
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
    raise AssertionError("it can be imported")
images, output, *files = sys.argv[1:]
found = {}
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
        found[f"{config} boxes {i}"] = instances.pred_boxes.tensor.numpy()
        found[f"{config} scores {i}"] = instances.scores.numpy()
        found[f"{config} classes {i}"] = instances.pred_classes.numpy()
np.savez(output, **found)
"""
IMAGES = [random_image(size, seed=i) for i, size in enumerate([(64, 64), (96, 71), (50, 130)])]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The models by name, and ``(boxes, scores, classes)`` that a process finds in each image with
    what was written of them, in which this package cannot be imported."""
    folder = tmp_path_factory.mktemp("exported")
    models, files = {}, {}
    for name, corners in (("corners", True), ("centers.v1", False)):
        settings = SETTINGS | {"MODEL.ROI_BOX_HEAD.CORNER_CODING": corners}
        models[name] = decisive_model(settings)
        weights = models[name].state_dict()
        files[name] = write_stock_detector(folder / name, tiny_config(settings), weights)
    np.savez(folder / "images.npz", *[image.numpy() for image in IMAGES])
    paths = [folder / "images.npz", folder / "found.npz", *itertools.chain(*files.values())]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STRANGER, *map(str, paths)],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = done.stderr + done.stdout
    assert "not found in" not in said and "incompatible" not in said  # weights and model fit
    loaded = np.load(folder / "found.npz")
    parts = ("boxes", "scores", "classes")
    found = {
        name: [[loaded[f"{config} {part} {i}"] for part in parts] for i in range(len(IMAGES))]
        for name, (_, config) in files.items()
    }
    return models, files, found


@torch.no_grad()
def found_here(model):
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
    ],
)
def test_detectron2_alone_finds_the_same(exported, name, expected):
    """In either coding; corners bring theirs along in a config in Python."""
    models, files, found = exported
    assert [file.name for file in files[name]] == expected
    for ours, theirs in zip(found_here(models[name]), found[name], strict=True):
        assert len(ours[0]) > 5
        np.testing.assert_allclose(theirs[0], ours[0], rtol=0, atol=1e-4)
        np.testing.assert_array_equal(theirs[1], ours[1])
        np.testing.assert_array_equal(theirs[2], ours[2])


def test_the_fold_is_written_with_a_config_for_it(tmp_path):
    """As for (dx, dy, dw, dh), which the box branch now predicts."""
    model, cfg = decisive_model(), tiny_config(SETTINGS)
    weights, config = write_stock_detector(
        tmp_path / "mine", cfg, model.state_dict(), first_order=True
    )
    assert config.name == "mine.yaml"
    written = get_cfg()
    written.merge_from_file(str(config))
    assert written.MODEL.WEIGHTS == weights.name
    folded = convert_box_branch(
        stock_weights(model.state_dict()), tuple(cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS)
    )
    found = pickle.loads(weights.read_bytes())["model"]
    assert found.keys() == folded.keys()
    assert all(np.array_equal(found[name], folded[name].numpy()) for name in folded)


# --- the fold to first order ----------------------------------------------------------------------

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
def test_the_fold_errs_by_the_rest_of_the_exponential(factors):
    """Sides are ``w * (exp(s) - 1 - s) / 2`` too far out, where the width grows by ``w * s``."""
    features, layer = torch.randn(2, 8), branch(size=0.3)
    ours = decoded(layer, features, BOXES, CornerBoxTransform(factors[:2]))
    folded = convert_box_branch(layer, factors)
    theirs = decoded(folded, features, BOXES, Box2BoxTransform(weights=factors))
    old, new = (b.unflatten(1, (-1, 2, 2)).diff(dim=2) for b in (BOXES, ours))
    growth = new / old - 1
    assert growth.abs().max() > 0.1
    rest = old * (growth.expm1() - growth) / 2
    expected = torch.cat([-rest, rest], dim=2).flatten(1)
    torch.testing.assert_close(theirs - ours, expected, rtol=0, atol=1e-4)


def test_the_fold_is_exact_for_shifts():
    layer = branch(size=0.5)
    for name in layer:  # both corners move alike
        rows = layer[name].unflatten(0, (-1, 2, 2))
        layer[name] = rows[:, :1].expand_as(rows).flatten(0, 2)
    features, factors = torch.randn(2, 8), (10.0, 10.0, 5.0, 5.0)
    ours = decoded(layer, features, BOXES, CornerBoxTransform())
    folded = convert_box_branch(layer, factors)
    theirs = decoded(folded, features, BOXES, Box2BoxTransform(weights=factors))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_the_fold_undoes_the_translation_of_plain_detectors():
    layer = branch()
    translated = {name: corners_from_centers(value) for name, value in layer.items()}
    back = convert_box_branch(translated, (10.0, 10.0, 5.0, 5.0))
    for name in layer:
        torch.testing.assert_close(back[name], layer[name])


def test_detectron2s_linear_coding_is_ours_until_a_side_passes_the_centre():
    """Why it would not do, even if a config could name it."""
    linear = Box2BoxTransformLinear()
    assert not hasattr(linear, "weights")  # which ROI heads ask a box coding for
    for offsets, same in (([1.0, -2.0, 3.0, 1.0], True), ([6.0, 0.0, 1.0, 0.0], False)):
        deltas = torch.tensor([offsets, offsets])
        sides = 0.5 + deltas / 10 * torch.tensor([-1.0, -1.0, 1.0, 1.0])
        ours = CornerBoxTransform().apply_deltas(deltas, BOXES)
        assert torch.allclose(ours, linear.apply_deltas(sides, BOXES)) == same


# --- the config -----------------------------------------------------------------------------------


def test_the_config_has_detectron2s_keys_alone():
    settings = SETTINGS | {"DATASETS.TRAIN": ["coco:/home/jane/a.json:/home/jane/a"]}
    config = stock_config(tiny_config(settings))
    fresh = get_cfg()
    fresh.merge_from_other_cfg(config)  # raises on a key that is not known
    assert fresh.MODEL.RESNETS.STEM_OUT_CHANNELS == 16
    assert "jane" not in config.dump()


def test_the_config_in_python_is_data_whatever_it_says(tmp_path):
    """A config can be a stranger's: of a zoo, or of a checkpoint."""
    text = '"""; raise SystemExit("ran"); """'
    cfg = tiny_config(SETTINGS)
    cfg.SOLVER.LR_SCHEDULER_NAME = text
    cfg.INPUT.RANDOM_FLIP = "C:\\new \x07"
    _, config_file = write_stock_detector(tmp_path / "mine", cfg, {})
    scope = {"__name__": "mine"}
    exec(config_file.read_text(), scope)
    assert scope["CONFIG"] == "\n" + stock_config(cfg).dump()
