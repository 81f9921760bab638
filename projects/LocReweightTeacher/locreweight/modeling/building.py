"""Building of the detector that a config describes."""

from __future__ import annotations

import traceback
from operator import attrgetter
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, ROI_HEADS_REGISTRY, build_model

from ..errors import UsageError, get_registered
from .meta_arch import SemiSupervisedRCNN
from .roi_heads import LocalizationAwareROIHeads

# Key, registry and this project's class.
_CLASSES = (
    ("MODEL.META_ARCHITECTURE", META_ARCH_REGISTRY, SemiSupervisedRCNN),
    ("MODEL.ROI_HEADS.NAME", ROI_HEADS_REGISTRY, LocalizationAwareROIHeads),
)


def build_detector(cfg: CfgNode) -> Any:
    """Build ``MODEL.META_ARCHITECTURE`` with random weights.

    Returns:
        a model, usually :class:`.meta_arch.SemiSupervisedRCNN`.

    Raises:
        UsageError: if the ``MODEL`` keys contradict each other or name unknown parts.
    """
    check_anchors(cfg)
    try:
        return build_model(cfg)
    except UsageError:
        raise
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = " ".join(str(error).split()) or repr(place.line)
        raise UsageError(
            f"the MODEL keys of the config do not describe a detector: {type(error).__name__}: "
            f"{reason} (at {place.filename}:{place.lineno})"
        ) from error


def find_other_class(cfg: CfgNode) -> tuple[str, str, str] | None:
    """Find a part of the detector that is not of a class of this project.

    Returns:
        config key, its value, and the name of this project's class; None if there is no such part.

    Raises:
        UsageError: if the config names an unknown class.
    """
    for key, registry, needed in _CLASSES:
        name = attrgetter(key)(cfg)
        registered = get_registered(registry, key, name)
        # Detectron2 also allows functions that build a model.
        if isinstance(registered, type) and not issubclass(registered, needed):
            return key, name, needed.__name__
    return None


def use_project_classes(cfg: CfgNode, source: str) -> None:
    """Replace Detectron2's classes in the config of a Faster R-CNN by this project's, in place.

    They have the same weights and, once :func:`.checkpoint.loading.load_for_evaluation` has loaded
    a plain detector, find the same boxes. The heads for masks and keypoints of such a config, which
    boxes do not depend on, are left out.

    Args:
        cfg: config of a trained detector, for inference.
        source: file of the config, for error messages.

    Raises:
        UsageError: if the config describes another kind of detector.
    """
    model = cfg.MODEL
    if model.META_ARCHITECTURE == "GeneralizedRCNN":
        model.META_ARCHITECTURE = SemiSupervisedRCNN.__name__
        model.MASK_ON = model.KEYPOINT_ON = False
    if model.ROI_HEADS.NAME == "StandardROIHeads":
        model.ROI_HEADS.NAME = LocalizationAwareROIHeads.__name__
    key, value, _ = find_other_class(cfg) or ("", "", "")
    if model.PROPOSAL_GENERATOR.NAME == "PrecomputedProposals":
        key, value = "MODEL.PROPOSAL_GENERATOR.NAME", model.PROPOSAL_GENERATOR.NAME
    if key:
        raise UsageError(
            f"{source}: {key} {value} is not supported. Of Detectron2's detectors, only "
            "GeneralizedRCNN with StandardROIHeads and a proposal network can be used here: use "
            "Detectron2's own tools for this one, or pass the config of such a detector"
        )


def check_anchors(cfg: CfgNode) -> None:
    """Check that the anchor keys fit the number of feature levels.

    Raises:
        UsageError: names the key and the number of levels.
    """
    levels = len(cfg.MODEL.RPN.IN_FEATURES)
    counts = [1] * levels
    for key in ("SIZES", "ASPECT_RATIOS"):
        values = cfg.MODEL.ANCHOR_GENERATOR[key]
        nested = bool(values) and all(isinstance(value, list | tuple) for value in values)
        per_level = list(values) if nested else [values]
        if len(per_level) not in (1, levels) or not all(per_level):
            raise UsageError(
                f"MODEL.ANCHOR_GENERATOR.{key} {values} has {len(per_level)} lists for {levels} "
                f"feature levels (MODEL.RPN.IN_FEATURES): give one list for each level, or a "
                "single one for all"
            )
        per_level = per_level * levels if len(per_level) == 1 else per_level
        if not all(isinstance(x, int | float) and x > 0 for level in per_level for x in level):
            raise UsageError(f"MODEL.ANCHOR_GENERATOR.{key} {values} must be positive numbers")
        counts = [count * len(level) for count, level in zip(counts, per_level, strict=True)]
    if len(set(counts)) > 1:
        raise UsageError(
            "MODEL.ANCHOR_GENERATOR.SIZES and ASPECT_RATIOS give different numbers of anchors to "
            f"the feature levels, {counts}: give each level the same number"
        )
