"""Building of the detector that a config describes."""

from __future__ import annotations

import traceback
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import build_model

from ..errors import UsageError


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
