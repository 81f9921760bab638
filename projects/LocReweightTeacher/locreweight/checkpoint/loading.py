"""Loading of weights for evaluation, and what a checkpoint says about its config and classes."""

from __future__ import annotations

import os

from detectron2.config import CfgNode
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.utils.file_io import PathManager

from ..errors import UsageError
from ..modeling.meta_arch import SemiSupervisedRCNN
from .checkpointer import (
    CheckpointContents,
    CheckpointDescription,
    TeacherCheckpointer,
    describe_mismatch,
)
from .safe_loading import read_weights


def load_for_evaluation(cfg: CfgNode, model: SemiSupervisedRCNN) -> CheckpointContents:
    """Load ``MODEL.WEIGHTS`` into a model, to evaluate it as it was trained.

    For a plain Detectron2 detector the model is switched to Detectron2's box coding.

    Returns:
        the kind of model that was loaded.

    Raises:
        UsageError: if the file does not exist, holds no detector, or does not fit the model, if it
            holds a plain detector and ``MODEL.ROI_BOX_HEAD.VOTING_SIGMA`` is above 0, or if the
            model has no ROI heads with a single box branch.
    """
    path = cfg.MODEL.WEIGHTS
    if not path:
        raise UsageError("--eval-only needs MODEL.WEIGHTS: a checkpoint, or an address of the zoo")
    check_weights_exist(path)
    box_predictor = getattr(getattr(model, "roi_heads", None), "box_predictor", None)
    proposals = cfg.MODEL.PROPOSAL_GENERATOR.NAME
    is_precomputed = proposals == "PrecomputedProposals"
    if not isinstance(box_predictor, FastRCNNOutputLayers) or is_precomputed:
        raise UsageError(
            f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE} with MODEL.ROI_HEADS.NAME "
            f"{cfg.MODEL.ROI_HEADS.NAME} and MODEL.PROPOSAL_GENERATOR.NAME {proposals} cannot be "
            "evaluated here, only Faster R-CNN: use Detectron2's own tools for this detector"
        )
    checkpointer = TeacherCheckpointer(
        model, save_to_disk=False, convert=False, trusted=cfg.MODEL.TRUST_WEIGHTS
    )
    checkpointer.load(path)
    contents = checkpointer.contents
    assert contents is not None
    if contents is CheckpointContents.BACKBONE:
        raise UsageError(f"{path} holds a backbone, not a detector: there is nothing to evaluate")
    mismatched = checkpointer.mismatched_weights
    if contents is CheckpointContents.PLAIN_DETECTOR:
        if cfg.MODEL.ROI_BOX_HEAD.VOTING_SIGMA > 0:
            raise UsageError(
                f"{path} is a plain Detectron2 detector, which predicts no variances: set "
                "MODEL.ROI_BOX_HEAD.VOTING_SIGMA to 0"
            )
        weights = cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS
        box_predictor.box2box_transform = Box2BoxTransform(weights)
        mismatched = tuple(name for name in mismatched if ".log_variance." not in name)
    if mismatched:
        raise UsageError(
            f"{path} does not fit the model of the config: {describe_mismatch(mismatched)}; use "
            "the config that it was trained with"
        )
    return contents


def check_weights_exist(path: str) -> None:
    """Check that weights can be read; an empty path means random weights.

    Raises:
        UsageError: if the file does not exist or cannot be downloaded.
    """
    if not path:
        return
    try:
        exists = os.path.isfile(PathManager.get_local_path(path))
    except Exception as error:
        raise UsageError(
            f"MODEL.WEIGHTS {path!r} cannot be downloaded: {error}. Download it on a machine with "
            "network, copy it here, and set MODEL.WEIGHTS to it"
        ) from error
    if not exists:
        raise UsageError(
            f"MODEL.WEIGHTS {path!r} does not exist; set it to a checkpoint, to an address of "
            "Detectron2's zoo (detectron2://...), or to '' to start from random weights"
        )


def read_description(file: str, *, trusted: bool = False) -> CheckpointDescription | None:
    """Read config and class names from a checkpoint; None for checkpoints of other projects.

    Args:
        file: a path or an address.
        trusted: as in :func:`.safe_loading.read_weights`.

    Raises:
        UsageError: if the file cannot be read.
    """
    content = read_weights(PathManager.get_local_path(file), trusted=trusted)
    return CheckpointDescription.from_checkpoint(content) if isinstance(content, dict) else None


def read_score_threshold(file: str, *, trusted: bool = False) -> float | None:
    """Read the score threshold with the best F1 on the test set from a checkpoint.

    :attr:`.engine.predictor.Predictor.score_threshold` is the same without reading the file again.

    Returns:
        None if the model was not evaluated when it was saved, and for other files.

    Raises:
        UsageError: as :func:`read_description`.
    """
    description = read_description(file, trusted=trusted)
    return description.score_threshold if description else None
