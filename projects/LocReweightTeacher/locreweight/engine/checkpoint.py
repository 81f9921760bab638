"""Checkpoints: what a file holds, and files that others made.

A checkpoint of ours is a Detectron2 checkpoint whose ``model`` is the **teacher**, which is the
result of training: any tool that reads Detectron2's files gets the right one of the two. Beside it
are ``student`` and ``trainer`` (iteration, optimizer, schedule), which resuming needs.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.utils.file_io import PathManager
from torch import Tensor

from ..errors import UsageError
from ..modeling.box_coding import CornerBoxTransform
from ..modeling.detector import SemiSupervisedRCNN

logger = logging.getLogger(__name__)

_PREDICTOR = "roi_heads.box_predictor."
_VARIANCE_KEY = _PREDICTOR + "log_variance.weight"
_BOX_KEY = _PREDICTOR + "bbox_pred."


class TeacherCheckpointer(DetectionCheckpointer):
    """Reads ours and plain Detectron2 detectors; the latter's box branch is translated.

    A detector without the localization-aware branch predicts ``(dx, dy, dw, dh)``. To be trained on
    in corner coding, its box branch is rewritten to predict corners: exactly for shifts, to first
    order for changes of size.
    """

    held = ""  # what the last file that was read holds, in words

    def _load_model(self, checkpoint: dict) -> Any:
        weights = checkpoint["model"]
        detector = any(_BOX_KEY in key for key in weights)
        if _holds_variance(weights):
            self.held = "the teacher" if "student" in checkpoint else "a detector of this project"
        else:
            self.held = "a plain Detectron2 detector" if detector else "a backbone"
        if self.held == "a plain Detectron2 detector":
            self._translate(weights)
        return super()._load_model(checkpoint)

    def _translate(self, weights: dict) -> None:
        coding = self.model.roi_heads.box_predictor.box2box_transform
        if isinstance(coding, CornerBoxTransform):
            # Names may have a prefix ("module."), which is only stripped later.
            for name in [name for name in weights if _BOX_KEY in name]:
                weights[name] = corners_from_centers(torch.as_tensor(weights[name]))
            logger.info("rewrote the box branch from (dx, dy, dw, dh) to corners")


def corners_from_centers(weights: Tensor) -> Tensor:
    """A box branch for ``(dx, dy, dw, dh)``, coded by (10, 10, 5, 5), as one for corners by 10.

    ``x1 = dx - w/2`` and ``w`` grows by ``exp(dw) ~ 1 + dw``; with these factors
    the coded corner offsets are ``dx - dw, dy - dh, dx + dw, dy + dh``.

    Args:
        weights: ``(C*4, ...)`` rows of a linear layer, or its bias.
    """
    dx, dy, dw, dh = weights.unflatten(0, (-1, 4)).unbind(dim=1)
    return torch.stack([dx - dw, dy - dh, dx + dw, dy + dh], dim=1).flatten(0, 1)


def load_for_evaluation(cfg: CfgNode, model: SemiSupervisedRCNN) -> str:
    """Load ``MODEL.WEIGHTS`` to evaluate it as it was trained.

    A plain Detectron2 detector is evaluated in its own box coding, which the model is switched to.

    Returns:
        what was loaded, in words.

    Raises:
        UsageError: if the file is not there or holds no detector.
    """
    path = cfg.MODEL.WEIGHTS
    if not path:
        raise UsageError(
            "--eval-only needs MODEL.WEIGHTS: a checkpoint, or the zoo's address of one"
        )
    need_weights(path)
    predictor = model.roi_heads.box_predictor
    corners = predictor.box2box_transform
    predictor.box2box_transform = Box2BoxTransform(cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS)
    checkpointer = TeacherCheckpointer(model, save_to_disk=False)
    checkpointer.load(path)
    if checkpointer.held == "a backbone":
        raise UsageError(f"{path} holds a backbone, not a detector: there is nothing to evaluate")
    if checkpointer.held != "a plain Detectron2 detector":
        predictor.box2box_transform = corners
    return checkpointer.held


def need_weights(path: str) -> None:
    """Raises UsageError if these weights cannot be had; an empty path means random weights."""
    if not path:
        return
    try:
        found = os.path.isfile(PathManager.get_local_path(path))
    except Exception as error:
        raise UsageError(f"MODEL.WEIGHTS {path!r} cannot be fetched: {error}") from error
    if not found:
        raise UsageError(
            f"MODEL.WEIGHTS {path!r} does not exist; name a checkpoint, an address of Detectron2's "
            "zoo (detectron2://...), or '' to start from random weights"
        )


def _holds_variance(weights: Mapping[str, object]) -> bool:
    return any(key.endswith(_VARIANCE_KEY) for key in weights)
