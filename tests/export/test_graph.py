"""TorchScript and ONNX find what the model finds, whatever the size of the image."""

import json
import os
from pathlib import Path

import onnx
import pytest
import torch

from export import check, differences, model_inputs, open_onnx, open_torchscript
from locreweight.engine.predictor import Predictor
from locreweight.errors import UsageError
from locreweight.export.graph import OUTPUTS, description, detections, write_onnx, write_torchscript
from locreweight.losses.localization import localization_quality
from tests.export.decisive_model import SETTINGS, decisive_model
from tests.modeling.tiny_model import random_image, tiny_config

ROOT = Path(__file__).parents[2]
BCCD = Path(os.environ.get("LOCREWEIGHT_BCCD") or ROOT.parent / "shared/data/bccd")
SIZES = [(64, 64), (96, 160), (131, 77)]  # the last is no multiple of the stride


@pytest.fixture(scope="module", params=["corners", "xywh, class-agnostic"])
def settings(request):
    plain = {
        "MODEL.ROI_BOX_HEAD.CORNER_CODING": False,
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
        "MODEL.ROI_BOX_HEAD.LOG_VARIANCE_LIMIT": 0.5,
    }
    return SETTINGS | (plain if "xywh" in request.param else {})


@pytest.fixture(scope="module")
def model(settings):
    return decisive_model(settings)


@pytest.fixture(scope="module")
def graphs(model, tmp_path_factory):
    """Files of both kinds, written from an image of a size that is not tested."""
    folder = tmp_path_factory.mktemp("graphs")
    example = random_image((80, 112), seed=9).float()
    write_torchscript(model, example, folder / "model.pt")
    described = description(tiny_config(SETTINGS), ["cat", "dog", "owl"])
    write_onnx(model, example, folder / "model.onnx", described)
    return folder


@pytest.fixture(params=["TorchScript", "ONNX"])
def graph(request, graphs):
    if request.param == "ONNX":
        return open_onnx(graphs / "model.onnx")
    return open_torchscript(graphs / "model.pt")


@torch.no_grad()
def test_the_model_finds_all_classes(model):
    """Otherwise the tests below would tell little."""
    found = [detections(model, random_image(size).float())[2] for size in SIZES]
    assert set(torch.cat(found).tolist()) == {0, 1, 2}


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_detections_are_the_models(model, graph, size):
    """The same, in the same order."""
    image = random_image(size).float()
    expected, found = detections(model, image), graph(image)
    assert len(expected[0]) > 5
    for name, ours, theirs in zip(OUTPUTS, expected, found, strict=True):
        tolerance = 1e-3 if name == "boxes" else 1e-4
        torch.testing.assert_close(theirs, ours, rtol=0, atol=tolerance)


@torch.no_grad()
def test_outputs_are_what_detectron2_gives(model, graph):
    """Without postprocessing, boxes are in pixels of the image that went in."""
    image = random_image(SIZES[1]).float()
    instances = model([{"image": image}])[0]["instances"]
    boxes, scores, classes, quality, log_variance = graph(image)
    torch.testing.assert_close(boxes, instances.pred_boxes.tensor, rtol=0, atol=1e-3)
    torch.testing.assert_close(scores, instances.scores, rtol=0, atol=1e-4)
    assert classes.tolist() == instances.pred_classes.tolist()
    torch.testing.assert_close(quality, instances.localization_quality, rtol=0, atol=1e-4)
    torch.testing.assert_close(quality, localization_quality(log_variance))
    assert log_variance.std() > 0.1
    limit = model.roi_heads.box_predictor.log_variance_limit
    assert log_variance.abs().max() <= limit
    if limit < 1:
        assert log_variance.abs().max() == limit


@torch.no_grad()
def test_an_image_without_objects_gives_none(tmp_path):
    """Whether objects are found is not fixed by the example."""
    model = decisive_model()
    images = [random_image((64, 64), seed=i).float() for i in range(4)]
    images.sort(key=lambda image: detections(model, image)[1].max())
    empty, *_, full = images
    highest = [detections(model, image)[1].max().item() for image in (empty, full)]
    model.roi_heads.box_predictor.test_score_thresh = sum(highest) / 2
    write_onnx(model, full, tmp_path / "model.onnx", {})
    graph = open_onnx(tmp_path / "model.onnx")
    assert [tuple(part.shape) for part in graph(empty)] == [(0, 4), (0,), (0,), (0,), (0, 4)]
    assert len(graph(full)[0]) > 0
    with pytest.raises(UsageError, match="finds nothing in the example"):
        write_onnx(model, empty, tmp_path / "other.onnx", {})


def test_onnx_says_what_it_takes_and_gives(graphs):
    session = onnx.load(graphs / "model.onnx")
    assert [output.name for output in session.graph.output] == list(OUTPUTS)
    properties = {p.key: json.loads(p.value) for p in session.metadata_props}
    assert properties == {
        "class_names": ["cat", "dog", "owl"],
        "format": "BGR",
        "shortest_side": 96,
        "longest_side": 160,
    }
    assert not any(node.domain for node in session.graph.node)  # ONNX's own operators alone


@torch.no_grad()
def test_a_graph_of_another_model_is_told_apart(model, graphs):
    images = [random_image(size).float() for size in SIZES]
    same = open_onnx(graphs / "model.onnx")
    assert "largest differences on 3 images of 3 sizes: boxes" in check(
        Path("mine.onnx"), model, same, images
    )

    def shifted(image):
        boxes, *others = same(image)
        return [boxes + 0.01, *others]

    assert differences(model, shifted, images)[0] == pytest.approx(0.01, abs=1e-3)
    with pytest.raises(UsageError, match=r"mine\.onnx differs from the model: boxes 1\.0e-02"):
        check(Path("mine.onnx"), model, shifted, images)
    with pytest.raises(UsageError, match="boxes inf"):
        check(Path("mine.onnx"), model, lambda image: [p[:-1] for p in same(image)], images)


@pytest.mark.skipif(
    not BCCD.is_dir(),
    reason=f"the BCCD data set is not at {BCCD}; LOCREWEIGHT_BCCD can name its folder",
)
@torch.no_grad()
def test_photographs_of_three_sizes(model, graph):
    """640 x 480 in the files, resized as for testing and to two other sizes."""
    files = [str(file) for file in sorted((BCCD / "JPEGImages").glob("*.jpg"))[:2]]
    images = []
    for shortest in (96, 128, 200):
        sized = {"INPUT.MIN_SIZE_TEST": shortest, "INPUT.MAX_SIZE_TEST": 400}
        detector = Predictor(
            tiny_config(SETTINGS | sized), model, [], has_localization_quality=True
        )
        images += model_inputs(detector, files)
    assert {tuple(image.shape[1:]) for image in images} == {(96, 128), (128, 171), (200, 267)}
    assert "6 images of 3 sizes" in check(Path("graph"), model, graph, images)
