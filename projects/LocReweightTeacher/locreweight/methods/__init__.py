"""The methods that can be compared, one file each; ``SEMI.METHOD`` names one.

A new method is a new file in this folder, which registers itself, and a config that names it:

    @METHOD_REGISTRY.register()
    def MyMethod(cfg) -> SemiSupervisedMethod: ...
"""

from __future__ import annotations

import importlib
import pkgutil

from .base import METHOD_REGISTRY, SampledProposals, SemiSupervisedMethod, build_method

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["METHOD_REGISTRY", "SampledProposals", "SemiSupervisedMethod", "build_method"]
