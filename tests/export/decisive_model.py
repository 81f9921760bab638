"""A random detector whose detections have clearly different boxes and scores."""

from __future__ import annotations

import torch
from torch import nn

from tests.modeling.tiny_model import random_image, tiny_model

SETTINGS = {
    "MODEL.RESNETS.NORM": "BN",
    "TEST.DETECTIONS_PER_IMAGE": 50,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.3,
    "INPUT.MIN_SIZE_TEST": 96,
    "INPUT.MAX_SIZE_TEST": 160,
}


def decisive_model(settings: dict | None = None):
    """Build the detector, in evaluation mode.

    Newly initialized layers predict almost the same for all boxes, so their outputs are scaled.
    """
    model = tiny_model(SETTINGS | (settings or {})).eval()
    head, predictor = model.proposal_generator.rpn_head, model.roi_heads.box_predictor
    for layer, spread in (
        (head.objectness_logits, 2.0),
        (head.anchor_deltas, 0.3),
        (predictor.cls_score, 2.0),
        (predictor.bbox_pred, 1.0),
        (predictor.log_variance, 1.0),
    ):
        _spread_outputs(model, layer, spread)
    return model


@torch.no_grad()
def _spread_outputs(model: nn.Module, layer: nn.Module, spread: float) -> None:
    """Scale each output of a layer to mean 0 and the given standard deviation over an image."""
    outputs_of_calls = []
    hook = layer.register_forward_hook(
        lambda *call: outputs_of_calls.append(call[-1].transpose(0, 1).flatten(1))
    )
    model([{"image": random_image((96, 128), seed=7)}])
    hook.remove()
    outputs = torch.cat(outputs_of_calls, dim=1)
    scale = spread / outputs.std(dim=1)
    layer.bias.copy_((layer.bias - outputs.mean(dim=1)) * scale)
    layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.dim() - 1)))
