"""Semi-supervised methods, one file each. The config key ``SEMI.METHOD`` names one.

To add a method, add a file to this folder and a config that names the method. All files in the
folder are imported. A method overrides the parts of :class:`SemiSupervisedMethod` in which it
differs:

.. code-block:: python

    from torch import Tensor

    from .base import METHOD_REGISTRY, SampledProposals, SemiSupervisedMethod


    @METHOD_REGISTRY.register()
    class ScoreWeighted(SemiSupervisedMethod):
        \"\"\"Weight each box by the squared score of its pseudo-label.\"\"\"

        def box_loss(self, proposals: SampledProposals) -> Tensor:
            return proposals.weighted_box_loss(proposals.matched_gt_field("gt_score") ** 2)
"""

from __future__ import annotations

import importlib
import pkgutil

from .base import (
    METHOD_REGISTRY,
    LabelingInputs,
    SampledProposals,
    SemiSupervisedMethod,
    StudentImage,
    build_members,
    build_method,
)

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "METHOD_REGISTRY",
    "LabelingInputs",
    "SampledProposals",
    "SemiSupervisedMethod",
    "StudentImage",
    "build_members",
    "build_method",
]
