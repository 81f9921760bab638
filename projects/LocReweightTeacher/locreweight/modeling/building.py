"""Building of the detector that a config describes."""

from __future__ import annotations

import traceback
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import build_model

from ..config import check_anchors
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
