"""Semi-supervised object detection via dynamic reweighting of localization error.

:mod:`~locreweight.losses`, :mod:`~locreweight.ema` and :mod:`~locreweight.geometry` implement the
paper's equations and need only PyTorch. The other modules use Detectron2. Importing this package
needs only the standard library; ``locreweight.Predictor`` imports the rest when it is first used.
"""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine.detections import Detections
    from .engine.predictor import Predictor

# What Detectron2 and fvcore do with PyTorch gives these warnings. Users cannot change it.
warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
warnings.filterwarnings("ignore", "torch.meshgrid: in an upcoming release", UserWarning)
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)

__all__ = ["Detections", "Predictor"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .engine import detections, predictor

    return getattr(predictor if name == "Predictor" else detections, name)
