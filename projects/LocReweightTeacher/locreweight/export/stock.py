"""Export to a plain Detectron2 ``GeneralizedRCNN``, which does not need this package.

A box branch that predicts ``(dx, dy, dw, dh)`` is exported as it is.

A box branch that predicts corners cannot be converted exactly: Detectron2 predicts a width of
``w * exp(dw)``, corner coding one of ``w * (1 + x2 - x1)``. Detectron2's
``Box2BoxTransformLinear`` is no replacement, since ROI heads cannot use it. There are two options:

- a Python config (Detectron2's lazy configs), which contains the box coding: exact;
- a conversion of the weights that is exact for shifts and of first order for changes of size: works
  with any Detectron2 config, but boxes deviate.
"""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Mapping
from pathlib import Path

from detectron2.config import CfgNode, get_cfg
from torch import Tensor

from ..checkpoint.conversion import centers_from_corners
from ..modeling import box_coding
from ..modeling.backbones import timm_backbones, uses_timm

_VARIANCE = "roi_heads.box_predictor.log_variance."
_BOXES = "roi_heads.box_predictor.bbox_pred."

_BUILD = '''

# The rest builds the detector from Detectron2's parts and the parts above:
#
#     cfg = LazyConfig.load("{name}.py")
#     model = instantiate(cfg.model)
#     DetectionCheckpointer(model).load("{name}.pkl")

import torch  # noqa: E402
from detectron2.config import CfgNode, LazyCall, get_cfg  # noqa: E402
from detectron2.modeling import build_model  # noqa: E402

CONFIG = """
{config}"""


def build_detector(device: str) -> torch.nn.Module:
    cfg = get_cfg()
    cfg.MODEL.set_new_allowed(True)
    cfg.merge_from_other_cfg(CfgNode.load_cfg(CONFIG))
    cfg.MODEL.DEVICE = device
    detector = build_model(cfg)
{box_coding}    return detector


model = LazyCall(build_detector)(device="cuda" if torch.cuda.is_available() else "cpu")
'''
_BOX_CODING = """\
    weights = tuple(cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS[:2])
    detector.roi_heads.box_predictor.box2box_transform = CornerBoxTransform(weights)
"""
_REGISTER = """

for builder in (build_timm_fpn_backbone, build_timm_simple_pyramid_backbone):
    if builder.__name__ not in BACKBONE_REGISTRY:
        BACKBONE_REGISTRY.register(builder)
"""
_FUTURE = "from __future__ import annotations\n"


def stock_config(cfg: CfgNode) -> CfgNode:
    """Config of the same detector with Detectron2's classes.

    The only keys of this project are those of a timm backbone.
    """
    stock = get_cfg()
    _copy_known(cfg, stock)
    stock.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    stock.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    stock.MODEL.WEIGHTS = ""
    stock.MODEL.DEVICE = get_cfg().MODEL.DEVICE  # the export itself runs on the CPU
    for key in ("TRAIN", "TEST"):
        stock.DATASETS[key] = ()  # not registered in plain Detectron2
    stock.OUTPUT_DIR = "./output"
    if uses_timm(cfg):
        stock.MODEL.TIMM = CfgNode(dict(cfg.MODEL.TIMM) | {"PRETRAINED": ""})
    return stock


def _copy_known(source: CfgNode, target: CfgNode) -> None:
    for key, value in target.items():
        if isinstance(value, CfgNode):
            _copy_known(source[key], value)
        elif key in source:
            target[key] = source[key]


def _quoted(text: str) -> str:
    """Escape a text for a triple-quoted string literal."""
    return text.replace("\\", "\\\\").replace('"', '\\"')


def stock_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a plain detector: all but the log-variance branch."""
    return {name: value for name, value in weights.items() if not name.startswith(_VARIANCE)}


def _timm_source() -> str:
    """Source of the timm backbones that runs without this package, and more than once."""
    source = inspect.getsource(timm_backbones)
    source = source.replace("from ...errors import UsageError", "UsageError = ValueError")
    return source.replace("@BACKBONE_REGISTRY.register()\n", "") + _REGISTER


def convert_box_branch(
    weights: Mapping[str, Tensor], factors: tuple[float, float, float, float]
) -> dict[str, Tensor]:
    """Convert the box branch of a state dict from corners to ``(dx, dy, dw, dh)``.

    Args:
        weights: state dict whose box branch predicts corners.
        factors: ``MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS``.
    """
    converted = dict(weights)
    for name in [name for name in weights if name.startswith(_BOXES)]:
        converted[name] = centers_from_corners(weights[name], factors)
    return converted


def write_stock_detector(
    target: Path,
    cfg: CfgNode,
    weights: Mapping[str, Tensor],
    *,
    first_order: bool = False,
) -> list[Path]:
    """Write ``<target>.pkl`` and its config for plain Detectron2.

    Args:
        target: path without suffix.
        cfg: config of the detector.
        weights: state dict of the detector.
        first_order: convert corners to Detectron2's box coding, which changes boxes slightly.

    Returns:
        the weight file and the config file: ``.yaml``, or ``.py`` if it contains the box coding or
        a timm backbone.
    """
    plain = stock_config(cfg)
    parts = stock_weights(weights)
    corners = cfg.MODEL.ROI_BOX_HEAD.CORNER_CODING
    if corners and first_order:
        parts = convert_box_branch(parts, tuple(cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS))
    target.parent.mkdir(parents=True, exist_ok=True)
    # Not with_suffix(), which would remove a part of a name with a dot.
    weights_file = target.with_name(target.name + ".pkl")
    with weights_file.open("wb") as file:
        arrays = {name: value.detach().cpu().numpy() for name, value in parts.items()}
        pickle.dump({"model": arrays, "__author__": "locreweight"}, file)
    exact_corners = corners and not first_order
    if exact_corners or uses_timm(cfg):
        config_file = target.with_name(target.name + ".py")
        parts_of_package = inspect.getsource(box_coding) if exact_corners else ""
        parts_of_package += _timm_source() if uses_timm(cfg) else ""
        built = _BUILD.format(
            name=target.name,
            config=_quoted(plain.dump()),
            box_coding=_BOX_CODING if exact_corners else "",
        )
        config_file.write_text(_FUTURE + parts_of_package.replace(_FUTURE, "") + built)
    else:
        plain.MODEL.WEIGHTS = weights_file.name
        config_file = target.with_name(target.name + ".yaml")
        config_file.write_text(plain.dump())
    return [weights_file, config_file]
