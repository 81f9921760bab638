"""Checkpoints: what a file holds, and files that others made.

A checkpoint of ours is a Detectron2 checkpoint whose ``model`` is the **teacher**, which is the
result of training: any tool that reads Detectron2's files gets the right one of the two. Beside it
are ``student`` and ``trainer`` (iteration, optimizer, schedule), which resuming needs.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.utils.file_io import PathManager
from torch import Tensor

from ..errors import UsageError
from ..modeling.box_coding import CornerBoxTransform
from ..modeling.detector import SemiSupervisedRCNN
from .checkpoint_description import CheckpointDescription
from .foreign_weights import not_loaded, teacher_of
from .safe_checkpointer import SafeCheckpointer

logger = logging.getLogger(__name__)

PLAIN_DETECTOR = "a plain Detectron2 detector"
_PREDICTOR = "roi_heads.box_predictor."
_VARIANCE_KEY = _PREDICTOR + "log_variance.weight"
_BOX_KEY = _PREDICTOR + "bbox_pred."


class TeacherCheckpointer(SafeCheckpointer):
    """Reads ours and plain Detectron2 detectors; the latter's box branch is translated.

    A detector without the localization-aware branch predicts ``(dx, dy, dw, dh)``. To be trained on
    in corner coding, its box branch is rewritten to predict corners: exactly for shifts, to first
    order for changes of size.
    """

    held = ""  # what the last file that was read holds, in words
    unfit: tuple[str, ...] = ()  # names of weights that it lacks, or has in another shape

    def __init__(
        self,
        model: SemiSupervisedRCNN,
        save_dir: str = "",
        *,
        translate: bool = True,
        description: CheckpointDescription | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            model: the teacher.
            save_dir: folder of the checkpoints.
            translate: rewrite the box branch of a plain detector, as described above.
            description: what is written beside the weights, so that a file can be used by itself.
            kwargs: those of :class:`SafeCheckpointer`.
        """
        super().__init__(model, save_dir, **kwargs)
        self._translates = translate
        self._description = description

    def save(self, name: str, **kwargs: Any) -> bool:
        described = self._description.as_fields() if self._description else {}
        return super().save(name, corner_coding=self._codes_corners, **described, **kwargs)

    @property
    def _codes_corners(self) -> bool:
        coding = self.model.roi_heads.box_predictor.box2box_transform
        return isinstance(coding, CornerBoxTransform)

    def _load_model(self, checkpoint: dict) -> Any:
        weights = checkpoint["model"] = teacher_of(checkpoint["model"])
        corners = checkpoint.get("corner_coding", self._codes_corners)
        if corners != self._codes_corners:
            raise UsageError(
                f"the checkpoint was trained with MODEL.ROI_BOX_HEAD.CORNER_CODING {corners}; "
                "set it alike"
            )
        detector = any(_BOX_KEY in key for key in weights)
        if _holds_variance(weights):
            self.held = "the teacher" if "student" in checkpoint else "a detector of this project"
        else:
            self.held = PLAIN_DETECTOR if detector else "a backbone"
        if self.held == PLAIN_DETECTOR and self._translates:
            self._translate(weights)
        incompatible = super()._load_model(checkpoint)
        wrong_shapes = [name for name, *_ in incompatible.incorrect_shapes]
        self.unfit = (*incompatible.missing_keys, *wrong_shapes)
        if self.resumes and self.unfit:
            raise UsageError(
                f"the run in {self.save_dir} has another model than the config: "
                f"{_some_of(self.unfit)}; use the config it was started with"
            )
        if self._translates and self.unfit:
            logger.warning(not_loaded(incompatible.missing_keys, wrong_shapes))
        return incompatible

    def _translate(self, weights: dict) -> None:
        if self._codes_corners:
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
        UsageError: if the file is not there, holds no detector, or one of another architecture.
    """
    path = cfg.MODEL.WEIGHTS
    if not path:
        raise UsageError(
            "--eval-only needs MODEL.WEIGHTS: a checkpoint, or the zoo's address of one"
        )
    need_weights(path)
    checkpointer = TeacherCheckpointer(
        model, save_to_disk=False, translate=False, trusted=cfg.MODEL.TRUST_WEIGHTS
    )
    checkpointer.load(path)
    if checkpointer.held == "a backbone":
        raise UsageError(f"{path} holds a backbone, not a detector: there is nothing to evaluate")
    unfit = checkpointer.unfit
    if checkpointer.held == PLAIN_DETECTOR:
        weights = cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS
        model.roi_heads.box_predictor.box2box_transform = Box2BoxTransform(weights)
        unfit = tuple(name for name in unfit if ".log_variance." not in name)
    if unfit:
        raise UsageError(
            f"{path} does not fit the model of the config: {_some_of(unfit)}; use the config it "
            "was trained with"
        )
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


def _some_of(unfit: Sequence[str]) -> str:
    names = ", ".join(unfit[:3])
    return f"{len(unfit)} weights are missing or of another shape, such as {names}"


def _holds_variance(weights: Mapping[str, object]) -> bool:
    return any(key.endswith(_VARIANCE_KEY) for key in weights)
