"""The methods that can be compared, one file each; ``SEMI.STRATEGY`` names one.

A new method is a new file in this folder, which registers itself, and a config that names it:

    @STRATEGY_REGISTRY.register()
    def MyMethod(cfg) -> Strategy: ...
"""

from __future__ import annotations

import importlib
import pkgutil

from .base import STRATEGY_REGISTRY, SampledProposals, Strategy, build_strategy

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["STRATEGY_REGISTRY", "SampledProposals", "Strategy", "build_strategy"]
