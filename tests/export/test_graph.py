"""TorchScript and ONNX graphs detect the same as the model, in images of any size."""

import json
import os
from pathlib import Path

import onnx
import pytest
import torch

from export import load_images
from locreweight.errors import UsageError
from locreweight.export.graph import (
    OUTPUTS,
    compare_with_model,
    export_graphs,
    graph_metadata,
    graph_outputs,
    largest_differences,
    load_onnx,
    load_torchscript,
    write_onnx,
    write_torchscript,
)
from locreweight.losses.localization import localization_quality
from tests.export.decisive_model import SETTINGS, decisive_model
from tests.modeling.tiny_model import TIMM_BACKBONES, random_image, tiny_config

ROOT = Path(__file__).parents[2]
BCCD = Path(os.environ.get("LOCREWEIGHT_BCCD") or ROOT.parent / "shared/data/bccd")
SIZES = [(64, 64), (96, 160), (131, 77)]  # the last is not a multiple of the stride


@pytest.fixture(
    scope="module",
    params=["corners", "voting", "xywh, class-agnostic", "timm_efficientnet", "timm_convnext"],
)
def settings(request):
    plain = {
        "MODEL.ROI_BOX_HEAD.CORNER_CODING": False,
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
        "MODEL.ROI_BOX_HEAD.LOG_VARIANCE_LIMIT": 0.5,
    }
    if "xywh" in request.param:
        return SETTINGS | plain
    if request.param == "voting":
        return SETTINGS | {"MODEL.ROI_BOX_HEAD.VOTING_SIGMA": 0.05}
    return SETTINGS | TIMM_BACKBONES.get(request.param, {})


@pytest.fixture(scope="module")
def model(settings):
    return decisive_model(settings)


@pytest.fixture(scope="module")
def graphs(model, tmp_path_factory):
    """Graph files, traced with an image size that no test uses."""
    folder = tmp_path_factory.mktemp("graphs")
    example = random_image((80, 112), seed=9).float()
    write_torchscript(model, example, folder / "model.pt")
    metadata = graph_metadata(tiny_config(SETTINGS), ["cat", "dog", "owl"], 0.4)
    write_onnx(model, example, folder / "model.onnx", metadata)
    return folder


@pytest.fixture(params=["TorchScript", "ONNX"])
def graph(request, graphs):
    if request.param == "ONNX":
        return load_onnx(graphs / "model.onnx")
    return load_torchscript(graphs / "model.pt")


@torch.no_grad()
def test_model_detects_all_classes(model):
    """Otherwise the other tests would check little."""
    classes = [graph_outputs(model, random_image(size).float())[2] for size in SIZES]
    assert set(torch.cat(classes).tolist()) == {0, 1, 2}


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_graph_has_the_same_outputs_as_the_model(model, graph, size):
    image = random_image(size).float()
    expected, actual = graph_outputs(model, image), graph(image)
    assert len(expected[0]) > 5
    for name, of_model, of_graph in zip(OUTPUTS, expected, actual, strict=True):
        tolerance = 1e-3 if name == "boxes" else 1e-4
        torch.testing.assert_close(of_graph, of_model, rtol=0, atol=tolerance)


@torch.no_grad()
def test_graph_has_the_same_outputs_as_detectron2_inference(model, graph):
    """Boxes are in pixels of the input image."""
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
def test_plain_transformers(tmp_path):
    """ONNX has no operator that interpolates their position embeddings."""
    model = decisive_model(TIMM_BACKBONES["timm_vit"])
    images = [random_image(size).float() for size in SIZES]
    (line,) = export_graphs(model, images, {}, torchscript=tmp_path / "model.pt")
    assert "on 3 images of 3 sizes" in line
    with pytest.raises(UsageError, match="position embeddings.*use TorchScript"):
        write_onnx(model, images[0], tmp_path / "model.onnx", {})


@torch.no_grad()
@pytest.mark.parametrize("sigma", [0.0, 0.05])
def test_graph_returns_no_detections_for_an_image_without_objects(tmp_path, sigma):
    """Tracing with an image with objects does not fix the number of detections."""
    model = decisive_model(SETTINGS | {"MODEL.ROI_BOX_HEAD.VOTING_SIGMA": sigma})
    images = [random_image((64, 64), seed=i).float() for i in range(4)]
    images.sort(key=lambda image: graph_outputs(model, image)[1].max())
    empty, *_, full = images
    highest = [graph_outputs(model, image)[1].max().item() for image in (empty, full)]
    model.roi_heads.box_predictor.test_score_thresh = sum(highest) / 2
    write_onnx(model, full, tmp_path / "model.onnx", {})
    graph = load_onnx(tmp_path / "model.onnx")
    assert [tuple(part.shape) for part in graph(empty)] == [(0, 4), (0,), (0,), (0,), (0, 4)]
    assert len(graph(full)[0]) > 0
    with pytest.raises(UsageError, match="detects nothing in the example"):
        write_onnx(model, empty, tmp_path / "other.onnx", {})


def test_onnx_file_has_metadata_and_standard_operators(graphs):
    session = onnx.load(graphs / "model.onnx")
    assert [output.name for output in session.graph.output] == list(OUTPUTS)
    properties = {p.key: json.loads(p.value) for p in session.metadata_props}
    assert properties == {
        "class_names": ["cat", "dog", "owl"],
        "score_threshold": 0.4,
        "format": "BGR",
        "shortest_side": 96,
        "longest_side": 160,
    }
    assert not any(node.domain for node in session.graph.node)  # only standard ONNX operators


@torch.no_grad()
def test_compare_with_model_rejects_a_different_graph(model, graphs):
    images = [random_image(size).float() for size in SIZES]
    same = load_onnx(graphs / "model.onnx")
    assert "largest differences on 3 images of 3 sizes: boxes" in compare_with_model(
        Path("mine.onnx"), model, same, images
    )

    def shifted(image):
        boxes, *others = same(image)
        return [boxes + 0.01, *others]

    assert largest_differences(model, shifted, images)[0] == pytest.approx(0.01, abs=1e-3)
    with pytest.raises(UsageError, match=r"mine\.onnx differs from the model: boxes 1\.0e-02"):
        compare_with_model(Path("mine.onnx"), model, shifted, images)

    def fewer(image):
        return [output[:-1] for output in same(image)]

    with pytest.raises(UsageError, match="boxes inf"):
        compare_with_model(Path("mine.onnx"), model, fewer, images)


@pytest.mark.skipif(
    not BCCD.is_dir(),
    reason=f"the BCCD data set is not at {BCCD}; set LOCREWEIGHT_BCCD to its folder",
)
@torch.no_grad()
def test_graph_detects_the_same_in_photos_of_three_sizes(model, graph):
    """The files are 640 x 480 and resized as for testing, with three settings."""
    files = [str(file) for file in sorted((BCCD / "JPEGImages").glob("*.jpg"))[:2]]
    images = []
    for shortest in (96, 128, 200):
        sized = {"INPUT.MIN_SIZE_TEST": shortest, "INPUT.MAX_SIZE_TEST": 400}
        images += load_images(tiny_config(SETTINGS | sized), files)
    assert {tuple(image.shape[1:]) for image in images} == {(96, 128), (128, 171), (200, 267)}
    line = compare_with_model(Path("graph"), model, graph, images)
    assert "6 images of 3 sizes" in line
