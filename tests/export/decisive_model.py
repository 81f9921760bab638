"""A detector with random weights whose detections differ clearly from each other."""

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
    """In evaluation mode. As they are made, layers predict about the same of every box."""
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
    """Has each output of a layer a mean of 0 and this deviation, over the boxes of an image."""
    seen = []
    hook = layer.register_forward_hook(
        lambda *call: seen.append(call[-1].transpose(0, 1).flatten(1))
    )
    model([{"image": random_image((96, 128), seed=7)}])
    hook.remove()
    outputs = torch.cat(seen, dim=1)
    scale = spread / outputs.std(dim=1)
    layer.bias.copy_((layer.bias - outputs.mean(dim=1)) * scale)
    layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.dim() - 1)))
