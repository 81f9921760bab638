"""Trained detectors for Detectron2 without this package: a plain ``GeneralizedRCNN``.

A box branch for ``(dx, dy, dw, dh)`` is Detectron2's own: the same weights give the same boxes.

A box branch for corners is not. Detectron2 makes the width ``w * exp(dw)`` of what the layer
predicts, and corners mean ``w * (1 + x2 - x1)``: no layer with other weights predicts the logarithm
of what this one predicts. ``Box2BoxTransformLinear``, which is linear in the four sides, cannot be
had in ROI heads (these ask for its ``weights``, and configs cannot name it), and stops a side at
the proposal's center. There are two ways out:

- a config in Python, as Detectron2's newer ones are, which brings the box coding with it: exact;
- a fold into weights to first order in the change of size: any Detectron2 config, boxes deviate.
"""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from detectron2.config import CfgNode, get_cfg
from torch import Tensor

from ..modeling import box_coding

_VARIANCE = "roi_heads.box_predictor.log_variance."
_BOXES = "roi_heads.box_predictor.bbox_pred."

_BUILD = '''

# What follows makes the detector from Detectron2's parts and the box coding above:
#
#     cfg = LazyConfig.load("{name}.py")
#     model = instantiate(cfg.model)
#     DetectionCheckpointer(model).load("{name}.pkl")

from detectron2.config import CfgNode, LazyCall, get_cfg  # noqa: E402
from detectron2.modeling import build_model  # noqa: E402

CONFIG = """
{config}"""


def build_detector(device: str) -> torch.nn.Module:
    cfg = get_cfg()
    cfg.merge_from_other_cfg(CfgNode.load_cfg(CONFIG))
    cfg.MODEL.DEVICE = device
    detector = build_model(cfg)
    weights = tuple(cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS[:2])
    detector.roi_heads.box_predictor.box2box_transform = CornerBoxTransform(weights)
    return detector


model = LazyCall(build_detector)(device="cuda" if torch.cuda.is_available() else "cpu")
'''


def stock_config(cfg: CfgNode) -> CfgNode:
    """The same detector from Detectron2's own classes, without this project's keys and data."""
    stock = get_cfg()
    _copy_known(cfg, stock)
    stock.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    stock.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    stock.MODEL.WEIGHTS = ""
    for key in ("TRAIN", "TEST"):
        stock.DATASETS[key] = ()  # their names mean nothing to it
    stock.OUTPUT_DIR = "./output"
    return stock


def _copy_known(source: CfgNode, target: CfgNode) -> None:
    for key, value in target.items():
        if isinstance(value, CfgNode):
            _copy_known(source[key], value)
        elif key in source:
            target[key] = source[key]


def _quoted(text: str) -> str:
    """What stands between three quotes for a text: it stays one, whoever wrote the config."""
    return text.replace("\\", "\\\\").replace('"', '\\"')


def stock_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those that a plain detector has: all but the branch for variances."""
    return {name: value for name, value in weights.items() if not name.startswith(_VARIANCE)}


def folded_to_first_order(
    weights: Mapping[str, Tensor], factors: tuple[float, float, float, float]
) -> dict[str, Tensor]:
    """A box branch for corners as one for ``(dx, dy, dw, dh)``.

    With ``exp(dw) ~ 1 + dw``: exact for shifts, to first order for changes of size.

    Args:
        weights: of a plain detector whose box branch predicts corners.
        factors: ``MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS``.
    """
    shift_x, shift_y, size_x, size_y = factors
    folded = dict(weights)
    for name in [name for name in weights if name.startswith(_BOXES)]:
        x1, y1, x2, y2 = weights[name].unflatten(0, (-1, 4)).unbind(dim=1)
        # Corners are coded by the factors of shifts.
        dw, dh = (x2 - x1) * size_x / shift_x, (y2 - y1) * size_y / shift_y
        folded[name] = torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, dw, dh], dim=1).flatten(0, 1)
    return folded


def write_stock_detector(
    target: Path,
    cfg: CfgNode,
    weights: Mapping[str, Tensor],
    *,
    first_order: bool = False,
) -> list[Path]:
    """Write ``<target>.pkl`` and its config, for Detectron2 alone.

    Args:
        target: path without a suffix.
        cfg: the detector's config.
        weights: its state dict.
        first_order: fold a box branch for corners into one of Detectron2's, which changes boxes.

    Returns:
        the files: the weights, and ``.yaml``, or ``.py`` where the box coding goes along.
    """
    plain = stock_config(cfg)
    parts = stock_weights(weights)
    corners = cfg.MODEL.ROI_BOX_HEAD.CORNER_CODING
    if corners and first_order:
        parts = folded_to_first_order(parts, tuple(cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS))
    target.parent.mkdir(parents=True, exist_ok=True)
    # Only the name is replaced: with_suffix() would take what follows a dot in it.
    weights_file = target.with_name(target.name + ".pkl")
    with weights_file.open("wb") as file:
        arrays = {name: value.detach().cpu().numpy() for name, value in parts.items()}
        pickle.dump({"model": arrays, "__author__": "locreweight"}, file)
    if corners and not first_order:
        config_file = target.with_name(target.name + ".py")
        built = _BUILD.format(name=target.name, config=_quoted(plain.dump()))
        config_file.write_text(inspect.getsource(box_coding) + built)
    else:
        plain.MODEL.WEIGHTS = weights_file.name
        config_file = target.with_name(target.name + ".yaml")
        config_file.write_text(plain.dump())
    return [weights_file, config_file]
