"""Export to TorchScript and ONNX, which need neither this package nor Detectron2.

A graph takes one image of any size and returns the detections in it:

====================  ==============  ============================================================
input                 shape, type     meaning
====================  ==============  ============================================================
``image``             (3, H, W) f32   0 to 255, resized, with channels ordered by ``INPUT.FORMAT``
====================  ==============  ============================================================

====================  ==============  ============================================================
output                shape, type     meaning
====================  ==============  ============================================================
``boxes``             (N, 4) f32      xyxy, absolute pixels of ``image``
``scores``            (N,) f32        class probabilities, in descending order
``classes``           (N,) int64      class indices
``quality``           (N,) f32        localization quality (Eq. 5)
``log_variance``      (N, 4) f32      of the box, in the units of its coding
====================  ==============  ============================================================

The graph contains normalization, padding and non-maximum suppression. It does not resize images:
libraries interpolate differently, and resizing should be the same as in training.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.export import TracingAdapter
from torch import Tensor

from ..errors import UsageError
from ..modeling.backbones import interpolates_position_embeddings
from ..modeling.meta_arch import SemiSupervisedRCNN

INPUT = "image"
OUTPUTS = ("boxes", "scores", "classes", "quality", "log_variance")
OPSET = 17  # ONNX's ROIAlign has the aligned mode, which Detectron2 uses, since opset 16

# Largest differences that the order of floating-point operations can explain: of boxes in pixels,
# or as a share of the longer side of large images; of scores and log-variances.
BOX_TOLERANCE, BOX_SHARE, VALUE_TOLERANCE = 1e-3, 1e-5, 1e-4

Graph = Callable[[Tensor], Sequence[Tensor]]


def export_graphs(
    model: SemiSupervisedRCNN,
    images: Sequence[Tensor],
    metadata: dict[str, Any],
    *,
    torchscript: Path | None = None,
    onnx: Path | None = None,
) -> list[str]:
    """Write a model as TorchScript and ONNX, and compare the graphs with the model.

    Beside each file a json with the metadata is written.

    Args:
        model: on the CPU.
        images: ``(3, H, W)`` float32 each, to trace and to compare with.
        metadata: see :func:`graph_metadata`.
        torchscript: file to write; None for no TorchScript.
        onnx: file to write; None for no ONNX.

    Returns:
        for each graph, a line with its differences from the model.

    Raises:
        UsageError: if the model detects nothing in the images, or a graph differs from the model.
    """
    with torch.no_grad():
        example = max(images, key=lambda image: len(graph_outputs(model, image)[0]))
    lines = []
    for file in filter(None, (torchscript, onnx)):
        file.parent.mkdir(parents=True, exist_ok=True)
        if file is torchscript:
            write_torchscript(model, example, file)
        else:
            write_onnx(model, example, file, metadata)
        file.with_name(file.name + ".json").write_text(json.dumps(metadata, indent=2) + "\n")
        graph = load_torchscript(file) if file is torchscript else load_onnx(file)
        lines.append(compare_with_model(file, model, graph, images))
    return lines


def graph_metadata(
    cfg: CfgNode, class_names: Sequence[str], score_threshold: float | None = None
) -> dict[str, Any]:
    """Class names, best score threshold, and size and channel order of input images, for json."""
    return {
        "class_names": list(class_names),
        "score_threshold": score_threshold,  # with the best F1 on the test set; None if unknown
        "format": cfg.INPUT.FORMAT,  # order of the channels
        "shortest_side": cfg.INPUT.MIN_SIZE_TEST,  # resize images to this, in pixels,
        "longest_side": cfg.INPUT.MAX_SIZE_TEST,  # unless the longer side would exceed this
    }


def graph_outputs(model: SemiSupervisedRCNN, image: Tensor) -> tuple[Tensor, ...]:
    """Outputs of a graph, computed by the model itself."""
    return _inference(model, [{"image": image}])


# -- writing ---------------------------------------------------------------------------------------


def write_torchscript(model: SemiSupervisedRCNN, image: Tensor, file: Path) -> None:
    """Write a model as TorchScript.

    Args:
        model: on the device that the graph will run on.
        image: ``(3, H, W)`` example, in which the model detects objects.
        file: file to write.

    Raises:
        UsageError: if the model detects nothing in the image.
    """
    adapter = _adapter(model, image)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # about constants in a trace; compare_with_model checks them
        traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
    torch.jit.save(traced, str(file))


def write_onnx(
    model: SemiSupervisedRCNN, image: Tensor, file: Path, metadata: dict[str, Any]
) -> None:
    """Write a model as ONNX.

    Args:
        model: on the CPU.
        image: ``(3, H, W)`` example, in which the model detects objects.
        file: file to write.
        metadata: metadata properties of the file; each value is stored as json.

    Raises:
        UsageError: if the model detects nothing in the image, or ONNX lacks an operator for it.
    """
    if interpolates_position_embeddings(model):
        raise UsageError(
            "ONNX cannot interpolate the position embeddings of this transformer as PyTorch does "
            "(bicubic, antialiased): use TorchScript, or train a model with rotary embeddings, "
            "such as DINOv3"
        )
    import onnx  # optional dependency: extra `export`

    adapter = _adapter(model, image)
    axes = {name: {0: "detections"} for name in OUTPUTS}
    # Not dynamo=True: torch.export does not support branches that depend on values, and Detectron2
    # checks whether all proposals are finite. A trace follows the branch of the example, and keeps
    # the numbers of proposals and detections variable, as Detectron2's code is written for tracing.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constants in a trace, and the deprecated exporter
        torch.onnx.export(
            adapter,
            adapter.flattened_inputs,
            str(file),
            dynamo=False,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            dynamic_axes={INPUT: {1: "height", 2: "width"}} | axes,
        )
    graph = onnx.load(str(file))
    onnx.helper.set_model_props(graph, {key: json.dumps(v) for key, v in metadata.items()})
    onnx.checker.check_model(graph)
    onnx.save(graph, str(file))


def _adapter(model: SemiSupervisedRCNN, image: Tensor) -> TracingAdapter:
    model.eval()
    with torch.no_grad():
        boxes = graph_outputs(model, image)[0]
    if not len(boxes):
        # The trace would lack the parts of the model that are applied to boxes.
        raise UsageError(
            "the model detects nothing in the example images; use images that contain objects"
        )
    return TracingAdapter(model, [{"image": image}], _inference).eval()


def _inference(model: SemiSupervisedRCNN, inputs: list[dict]) -> tuple[Tensor, ...]:
    detections = model.inference(inputs, do_postprocess=False)[0]
    return (
        detections.pred_boxes.tensor,
        detections.scores,
        detections.pred_classes,
        # ONNX Runtime 1.23, the last one for Python 3.10, returns the mean over the coordinates of
        # no detections with shape (0, 4). In PyTorch the shape is already this one.
        detections.localization_quality.reshape(detections.scores.shape),
        detections.log_variance,
    )


# -- comparison ------------------------------------------------------------------------------------


def load_torchscript(file: Path) -> Graph:
    return torch.jit.load(str(file))


def load_onnx(file: Path) -> Graph:
    import onnxruntime  # optional dependency: extra `export`

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda image: [
        torch.from_numpy(output) for output in session.run(list(OUTPUTS), {INPUT: image.numpy()})
    ]


def compare_with_model(
    file: Path, model: SemiSupervisedRCNN, graph: Graph, images: Sequence[Tensor]
) -> str:
    """Check that a graph computes the same as the model.

    Args:
        file: the graph's file, for messages.
        model: the exported model.
        graph: the graph.
        images: ``(3, H, W)`` float32 each.

    Returns:
        a line with the largest differences.

    Raises:
        UsageError: if the order of floating-point operations does not explain the differences.
    """
    differences = largest_differences(model, graph, images)
    sizes = {tuple(image.shape[1:]) for image in images}
    line = ", ".join(
        f"{name} {value:.1e}" for name, value in zip(OUTPUTS, differences, strict=True)
    )
    boxes, *others = differences
    longest = max(max(size) for size in sizes)
    if boxes > max(BOX_TOLERANCE, BOX_SHARE * longest) or max(others) > VALUE_TOLERANCE:
        raise UsageError(f"{file} differs from the model: {line}")
    return f"{file}: largest differences on {len(images)} images of {len(sizes)} sizes: {line}"


@torch.no_grad()
def largest_differences(
    model: SemiSupervisedRCNN, graph: Graph, images: Sequence[Tensor]
) -> list[float]:
    """Largest absolute difference of each of ``OUTPUTS``; infinite if shapes differ."""
    largest = [0.0] * len(OUTPUTS)
    for image in images:
        outputs = zip(graph_outputs(model, image), graph(image), strict=True)
        for i, (expected, actual) in enumerate(outputs):
            same_shape = expected.shape == actual.shape
            difference = (
                (expected - actual).abs().float() if same_shape else torch.tensor([torch.inf])
            )
            largest[i] = max(largest[i], *difference.flatten().tolist(), 0.0)
    return largest
