"""Backbones beside Detectron2's own. Importing this package registers them."""

from .timm_backbones import (
    TimmBackbone,
    build_timm_fpn_backbone,
    build_timm_simple_pyramid_backbone,
    interpolates_position_embeddings,
    set_timm_input,
    uses_timm,
)

__all__ = [
    "TimmBackbone",
    "build_timm_fpn_backbone",
    "build_timm_simple_pyramid_backbone",
    "interpolates_position_embeddings",
    "set_timm_input",
    "uses_timm",
]
