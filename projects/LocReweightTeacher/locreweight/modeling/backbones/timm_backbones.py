"""Backbones from timm (https://github.com/huggingface/pytorch-image-models) with a feature pyramid.

Models are built with random weights; :mod:`locreweight.checkpoint.timm_weights` loads pretrained
ones. ``locreweight/export/stock.py`` copies this file into exported detectors, so it imports
nothing else of this package. timm is imported where it is used, because that takes a second.
"""

from __future__ import annotations

import difflib
import math
from typing import Any

import numpy as np
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone import SimpleFeaturePyramid
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import Tensor, nn

from ...errors import UsageError

FPN_BUILDER = "build_timm_fpn_backbone"
SIMPLE_PYRAMID_BUILDER = "build_timm_simple_pyramid_backbone"
_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
_PATCH_SIZE = 16  # of plain transformers; other patch embeddings are resampled to it
_SIMPLE_PYRAMID_SCALES = (4.0, 2.0, 1.0, 0.5)  # feature maps of stride 4 to 32, as in ViTDet


class TimmBackbone(Backbone):
    """A timm model that returns feature maps, named as those of Detectron2's ResNets.

    ``res2`` has stride 4, ``res3`` stride 8, and so on.

    Attributes:
        net: the timm model, built with ``features_only=True``.
    """

    def __init__(self, net: Any, names: list[str]) -> None:
        """
        Args:
            net: the timm model. It returns a list of feature maps: ``(N, C, H, W)``, or
                ``(N, H, W, C)`` if its ``output_fmt`` says so.
            names: names of its feature maps that are used.
        """
        super().__init__()
        self.net = net
        self._all_names = stage_names(net)
        self._channels_last = getattr(net, "output_fmt", "NCHW") == "NHWC"
        shapes = zip(net.feature_info.channels(), net.feature_info.reduction(), strict=True)
        self._shapes = {
            name: ShapeSpec(channels=channels, stride=stride)
            for name, (channels, stride) in zip(self._all_names, shapes, strict=True)
            if name in names
        }

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the feature maps ``(N, C, H / stride, W / stride)`` of normalized images."""
        maps = zip(self._all_names, self.net(images), strict=True)
        features = {name: feature for name, feature in maps if name in self._shapes}
        if self._channels_last:
            return {name: feature.permute(0, 3, 1, 2) for name, feature in features.items()}
        return features

    def output_shape(self) -> dict[str, ShapeSpec]:
        return self._shapes


class SimplePyramid(SimpleFeaturePyramid):
    """Detectron2's pyramid for plain transformers, for which images are padded to its strides."""

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec | None = None) -> FPN:
    """Build ``MODEL.TIMM.NAME`` with Detectron2's FPN on the maps ``MODEL.FPN.IN_FEATURES``.

    Raises:
        UsageError: if timm does not have the model, or the model does not have these feature maps.
    """
    wanted = list(cfg.MODEL.FPN.IN_FEATURES)
    pretrained = pretrained_settings(cfg.MODEL.TIMM.NAME)
    if pretrained.fixed_input_size:
        raise UsageError(
            f"MODEL.TIMM.NAME {cfg.MODEL.TIMM.NAME} takes images of one size only, or is a plain "
            f"transformer: choose another model, or MODEL.BACKBONE.NAME {SIMPLE_PYRAMID_BUILDER} "
            "for a plain transformer"
        )
    net = _build_net(cfg)
    names = stage_names(net)
    # Detectron2's FPN needs the last map, and layers after the last used one would not be trained.
    if not set(wanted) <= set(names) or wanted[-1:] != names[-1:]:
        raise UsageError(
            f"MODEL.TIMM.NAME {cfg.MODEL.TIMM.NAME} has the feature maps {', '.join(names)}, but "
            f"MODEL.FPN.IN_FEATURES is {wanted}: choose the last of these maps and those before it"
        )
    bottom_up = TimmBackbone(_with_norms(net, cfg), wanted)
    _freeze_stages(net, cfg)
    return FPN(
        bottom_up=bottom_up,
        in_features=wanted,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


@BACKBONE_REGISTRY.register()
def build_timm_simple_pyramid_backbone(
    cfg: CfgNode, input_shape: ShapeSpec | None = None
) -> SimplePyramid:
    """Build a plain vision transformer of timm with the simple feature pyramid of ViTDet.

    Patch embeddings of another size are resampled to 16 pixels, and position embeddings are
    interpolated to the size of the images. If ``MODEL.FPN.NORM`` is empty, the pyramid has layer
    norm as in ViTDet.

    Raises:
        UsageError: if timm does not have the model, or it is not a plain transformer.
    """
    try:
        net = _build_net(cfg, out_indices=(-1,))
        blocks = net.model.blocks
    except (AssertionError, AttributeError, TypeError) as error:
        raise UsageError(
            f"MODEL.TIMM.NAME {cfg.MODEL.TIMM.NAME} is not a plain vision transformer for "
            f"images of any size: choose another model, or MODEL.BACKBONE.NAME {FPN_BUILDER} for "
            "a model with feature maps of several strides"
        ) from error
    _freeze_blocks(net.model, blocks, cfg.MODEL.BACKBONE.FREEZE_AT)
    backbone = TimmBackbone(net, stage_names(net))
    return SimplePyramid(
        backbone,
        in_feature=stage_names(net)[-1],
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        scale_factors=_SIMPLE_PYRAMID_SCALES,
        norm=cfg.MODEL.FPN.NORM or "LN",
        top_block=LastLevelMaxPool(),
    )


def interpolates_position_embeddings(model: nn.Module) -> bool:
    """Whether a detector has a transformer that interpolates position embeddings to the image."""
    nets = [module.net for module in model.modules() if isinstance(module, TimmBackbone)]
    return any(getattr(getattr(n, "model", None), "pos_embed", None) is not None for n in nets)


# -- config ----------------------------------------------------------------------------------------


def uses_timm(cfg: CfgNode) -> bool:
    """Whether the backbone of a config is built by this module."""
    return cfg.MODEL.BACKBONE.NAME in (FPN_BUILDER, SIMPLE_PYRAMID_BUILDER)


def pretrained_settings(name: str) -> Any:
    """Look up timm's description (``PretrainedCfg``) of a model and its pretrained weights.

    Args:
        name: timm's name, with or without a tag, such as ``resnet50.a1_in1k``.

    Raises:
        UsageError: if timm does not have the model or the tag.
    """
    import timm

    model, _, tag = name.partition(".")
    if not timm.is_model(model):
        close = difflib.get_close_matches(model, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise UsageError(
            f"MODEL.TIMM.NAME {name!r}: timm {timm.__version__} has no such model{hint}"
        )
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{model}.*")]
    if tag and tag not in tags:
        raise UsageError(
            f"MODEL.TIMM.NAME {name!r}: timm {timm.__version__} has no weights {tag!r} for this "
            f"model; it has {', '.join(tags) or 'none'}"
        )
    return timm.get_pretrained_cfg(name)


def set_timm_input(cfg: CfgNode) -> None:
    """Set pixel mean, pixel std and channel order to those of a timm backbone, in place.

    timm's models take RGB images. Keys at Detectron2's default count as not set.

    Raises:
        UsageError: if the config sets other values.
    """
    if not uses_timm(cfg):
        return
    settings = pretrained_settings(cfg.MODEL.TIMM.NAME)
    default = get_cfg()
    for section, key, value in (
        ("MODEL", "PIXEL_MEAN", [round(255 * x, 4) for x in settings.mean]),
        ("MODEL", "PIXEL_STD", [round(255 * x, 4) for x in settings.std]),
        ("INPUT", "FORMAT", "RGB"),
    ):
        current = cfg[section][key]
        if current == default[section][key]:
            cfg[section][key] = value
        elif not _same(current, value):
            raise UsageError(
                f"{section}.{key} is {current}, but MODEL.TIMM.NAME {cfg.MODEL.TIMM.NAME} was "
                f"trained with {value}: leave the key out"
            )


def _same(first: Any, second: Any) -> bool:
    if isinstance(second, str):
        return first == second
    return len(first) == len(second) and np.allclose(first, second, atol=0.01)


def model_arguments(cfg: CfgNode) -> dict[str, Any]:
    """Arguments of ``timm.create_model`` that change the weights of the model of a config."""
    if cfg.MODEL.BACKBONE.NAME == SIMPLE_PYRAMID_BUILDER:
        return {"dynamic_img_size": True, "patch_size": _PATCH_SIZE}
    return {}


# -- parts of the model ----------------------------------------------------------------------------


def stage_names(net: Any) -> list[str]:
    """Names of the feature maps of a timm model: ``res2`` for stride 4, ``res3`` for stride 8."""
    return [f"res{int(math.log2(stride))}" for stride in net.feature_info.reduction()]


def _build_net(cfg: CfgNode, **arguments: Any) -> Any:
    import timm

    settings = cfg.MODEL.TIMM
    pretrained_settings(settings.NAME)  # for its error message
    if settings.DROP_PATH:
        arguments["drop_path_rate"] = settings.DROP_PATH
    arguments |= model_arguments(cfg)
    try:
        return timm.create_model(settings.NAME, features_only=True, **arguments)
    except RuntimeError as error:
        raise UsageError(
            f"MODEL.TIMM.NAME {settings.NAME} gives no feature maps: {error}"
        ) from error


def _with_norms(net: nn.Module, cfg: CfgNode) -> nn.Module:
    """Replace the batch norms of a model as ``MODEL.TIMM.NORM`` says."""
    norm = cfg.MODEL.TIMM.NORM
    if norm == "FrozenBN":
        return _freeze_norms(net)
    if norm == "SyncBN":
        from timm.layers import convert_sync_batchnorm

        return convert_sync_batchnorm(net)
    if norm != "BN":
        raise UsageError(f"MODEL.TIMM.NORM is {norm!r}; it must be FrozenBN, BN or SyncBN")
    return net


class FrozenBatchNormAct2d(FrozenBatchNorm2d):
    """Frozen batch norm with the activation that timm's ``BatchNormAct2d`` contains."""

    def __init__(self, norm: Any) -> None:
        super().__init__(norm.num_features, norm.eps)
        self.num_batches_tracked = norm.num_batches_tracked
        self.load_state_dict(norm.state_dict())
        self.drop, self.act = norm.drop, norm.act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


def _freeze_norms(module: nn.Module) -> nn.Module:
    """Convert all batch norms of a module, in place or, if it is one itself, into a new module."""
    from timm.layers import BatchNormAct2d, SyncBatchNormAct

    if isinstance(module, BatchNormAct2d | SyncBatchNormAct):
        return FrozenBatchNormAct2d(module)
    if isinstance(module, _BATCH_NORMS):
        return FrozenBatchNorm2d.convert_frozen_batchnorm(module)
    for name, child in module.named_children():
        module.add_module(name, _freeze_norms(child))
    return module


def _freeze_stages(net: Any, cfg: CfgNode) -> None:
    """Freeze parameters and batch norms up to a stage, as ``MODEL.BACKBONE.FREEZE_AT`` says.

    As in Detectron2's ResNets, 1 stands for the layers before the stage of stride 4, 2 for that
    stage as well, and so on. Like timm's feature extraction this relies on modules being registered
    in the order of their use.
    """
    freeze_at = cfg.MODEL.BACKBONE.FREEZE_AT
    if freeze_at < 1:
        return
    stages = dict(zip(stage_names(net), net.feature_info.module_name(), strict=True))
    stage = stages.get(f"res{max(freeze_at, 2)}", "")
    prefix = flat_name(stage) + "_"
    weights = list(net.state_dict())
    inside = [i for i, weight in enumerate(weights) if flat_name(weight).startswith(prefix)]
    if not (stage and inside):
        raise UsageError(
            f"MODEL.BACKBONE.FREEZE_AT {freeze_at}: MODEL.TIMM.NAME {cfg.MODEL.TIMM.NAME} has no "
            f"such stage that can be frozen (it has {', '.join(stages)}). Set 0 to train all layers"
        )
    frozen = set(weights[: inside[0] if freeze_at == 1 else inside[-1] + 1])
    for name, parameter in net.named_parameters():
        parameter.requires_grad = name not in frozen
    for name, module in list(net.named_modules()):
        if isinstance(module, _BATCH_NORMS) and f"{name}.running_mean" in frozen:
            parent, _, child = name.rpartition(".")
            net.get_submodule(parent).add_module(child, _freeze_norms(module))


def _freeze_blocks(model: nn.Module, blocks: nn.Sequential, freeze_at: int) -> None:
    """Freeze the embeddings of a plain transformer if ``freeze_at`` is at least 1.

    Each further number freezes one more block.
    """
    if freeze_at < 1:
        return
    frozen = {id(p) for block in blocks[: freeze_at - 1] for p in block.parameters()}
    trained = {id(p) for block in blocks for p in block.parameters()} - frozen
    for parameter in model.parameters():
        parameter.requires_grad = id(parameter) in trained


def flat_name(name: str) -> str:
    """Name of a weight without the difference that timm's feature extraction makes.

    It renames ``stages.0`` to ``stages_0`` and may put the model into a submodule ``model``.
    """
    return name.removeprefix("model.").replace(".", "_")
