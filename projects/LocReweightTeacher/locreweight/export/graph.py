"""Detectors as graphs that run without this package and Detectron2: TorchScript and ONNX.

A graph takes one image of any size and gives what the model finds in it:

====================  ==============  =============================================================
input                 shape, type     meaning
====================  ==============  =============================================================
``image``             (3, H, W) f32   0 to 255, channels as ``INPUT.FORMAT`` says, already resized
====================  ==============  =============================================================

====================  ==============  =============================================================
output                shape, type     meaning
====================  ==============  =============================================================
``boxes``             (N, 4) f32      xyxy, absolute pixels of ``image``
``scores``            (N,) f32        class probability, in falling order
``classes``           (N,) int64      index of the class
``quality``           (N,) f32        localization quality (Eq. 5)
``log_variance``      (N, 4) f32      of the box, in the units of its coding
====================  ==============  =============================================================

Resizing stays outside: libraries interpolate differently, and a model should see what it was
trained on. Normalization, padding and the removal of duplicates are inside.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.export import TracingAdapter
from torch import Tensor

from ..errors import UsageError
from ..modeling.meta_arch import SemiSupervisedRCNN

INPUT = "image"
OUTPUTS = ("boxes", "scores", "classes", "quality", "log_variance")
OPSET = 17  # ROIAlign is the one that the detector was trained with from 16 on


def detections(model: SemiSupervisedRCNN, image: Tensor) -> tuple[Tensor, ...]:
    """What a graph computes, by the model itself; see :mod:`locreweight.export.graph`."""
    return _inference(model, [{"image": image}])


def write_torchscript(model: SemiSupervisedRCNN, image: Tensor, file: Path) -> None:
    """Write a model as TorchScript.

    Args:
        model: on the device that the graph will run on.
        image: an example, ``(3, H, W)``; one in which the model finds something.
        file: to write.

    Raises:
        UsageError: here and below: if the model finds nothing in the image.
    """
    adapter = _adapter(model, image)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what a trace keeps constant; comparing tells more
        traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
    torch.jit.save(traced, str(file))


def write_onnx(
    model: SemiSupervisedRCNN, image: Tensor, file: Path, described: dict[str, Any]
) -> None:
    """Write a model as ONNX.

    Args:
        model: on the CPU.
        image: an example, ``(3, H, W)``; one in which the model finds something.
        file: to write.
        described: kept in the file's metadata, each value as json.
    """
    import onnx  # of the extra `export`

    adapter = _adapter(model, image)
    axes = {name: {0: "detections"} for name in OUTPUTS}
    # dynamo=True stops where Detectron2 asks whether all proposals are finite: torch.export takes
    # no branch that depends on values. A trace goes by the branch of the example, and the numbers
    # of proposals and detections stay free, for which Detectron2 is written.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as above, and of the exporter's age
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
    onnx.helper.set_model_props(graph, {key: json.dumps(v) for key, v in described.items()})
    onnx.checker.check_model(graph)
    onnx.save(graph, str(file))


def description(cfg: CfgNode, class_names: Sequence[str]) -> dict[str, Any]:
    """What a program that runs the graph has to know, for json."""
    return {
        "class_names": list(class_names),
        "format": cfg.INPUT.FORMAT,  # order of the channels
        "shortest_side": cfg.INPUT.MIN_SIZE_TEST,  # that images are resized to, in pixels,
        "longest_side": cfg.INPUT.MAX_SIZE_TEST,  # unless this one would become longer
    }


def _adapter(model: SemiSupervisedRCNN, image: Tensor) -> TracingAdapter:
    model.eval()
    with torch.no_grad():
        found = detections(model, image)[0]
    if not len(found):
        # Parts of the model that see no box would be left out of the graph.
        raise UsageError("the model finds nothing in the example image; give one with objects")
    return TracingAdapter(model, [{"image": image}], _inference).eval()


def _inference(model: SemiSupervisedRCNN, inputs: list[dict]) -> tuple[Tensor, ...]:
    found = model.inference(inputs, do_postprocess=False)[0]
    return (
        found.pred_boxes.tensor,
        found.scores,
        found.pred_classes,
        found.localization_quality,
        found.log_variance,
    )
