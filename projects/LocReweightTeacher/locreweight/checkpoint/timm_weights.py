"""Pretrained weights of timm backbones: find, read and load them, and write a trained backbone.

Files are only read as numbers (:mod:`.safe_loading`). Weights go through timm's own conversion of
older formats. Every weight that the backbone uses must be in the file.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from ..errors import UsageError
from ..modeling.backbones.timm_backbones import (
    TimmBackbone,
    flat_name,
    model_arguments,
    pretrained_settings,
    uses_timm,
)
from .safe_loading import SAFETENSORS_SUFFIX, read_weights, short_reason, write_safetensors

logger = logging.getLogger(__name__)

HUB = "hub"  # value of MODEL.TIMM.PRETRAINED: the weights that timm publishes
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
# Entries of training checkpoints that hold the weights, the best first.
_ENTRIES = ("state_dict_ema", "model_ema", "state_dict", "model")

# torchvision's MobileNetV2: number of blocks in each stage.
_MOBILENET_V2_BLOCKS = (1, 2, 3, 4, 3, 3, 1)
_EXPANDED = {
    "0.0": "conv_pw", "0.1": "bn1", "1.0": "conv_dw", "1.1": "bn2", "2": "conv_pwl", "3": "bn3",
}  # fmt: skip
_NOT_EXPANDED = {"0.0": "conv_dw", "0.1": "bn1", "1": "conv_pw", "2": "bn2"}


# -- where the weights are -------------------------------------------------------------------------


def starts_from_timm_weights(cfg: CfgNode) -> bool:
    """Whether a new training loads ``MODEL.TIMM.PRETRAINED``: only without ``MODEL.WEIGHTS``."""
    return bool(uses_timm(cfg) and cfg.MODEL.TIMM.PRETRAINED and not cfg.MODEL.WEIGHTS)


def find_pretrained(cfg: CfgNode) -> str:
    """Find the file of ``MODEL.TIMM.PRETRAINED``, and download it if it is not in the cache.

    Returns:
        path of the file; empty if the training does not start from it.

    Raises:
        UsageError: if there is no such file, or it cannot be downloaded.
    """
    if not starts_from_timm_weights(cfg):
        return ""
    source, name = cfg.MODEL.TIMM.PRETRAINED, cfg.MODEL.TIMM.NAME
    if source == HUB:
        return _from_hub(name)
    if not Path(source).is_file():
        raise UsageError(
            f"MODEL.TIMM.PRETRAINED {source!r} does not exist; set it to a file of weights for "
            f"{name}, to {HUB} for the weights that timm publishes, or to '' for random weights"
        )
    return source


def _from_hub(name: str) -> str:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    settings = pretrained_settings(name)
    repository, _, revision = (settings.hf_hub_id or "").partition("@")
    if not repository:
        raise UsageError(
            f"timm publishes no PyTorch weights for MODEL.TIMM.NAME {name}: use another tag, or "
            "set MODEL.TIMM.PRETRAINED to a file"
        )
    files = (settings.hf_hub_filename,) if settings.hf_hub_filename else _HUB_FILES
    # The cache first: asking the server whether the file is the newest fails without network.
    for file in files:
        cached = try_to_load_from_cache(repository, file, revision=revision or None)
        if isinstance(cached, str):
            return cached
    reason = _why_unreachable(ENDPOINT)
    for file in () if reason else files:
        try:
            logger.info("downloading %s of https://huggingface.co/%s", file, repository)
            return hf_hub_download(repository, file, revision=revision or None)
        except LocalEntryNotFoundError as error:  # the server cannot be reached
            reason = short_reason(error)
            break
        except EntryNotFoundError as error:
            reason = short_reason(error)
        except Exception as error:  # network libraries raise many kinds
            reason = short_reason(error)
            break
    raise UsageError(
        f"the weights of MODEL.TIMM.NAME {name} are not in this machine's cache and cannot be "
        f"downloaded ({reason}). On a machine with network, get {files[0]} from "
        f"https://huggingface.co/{repository}, copy it here, and set MODEL.TIMM.PRETRAINED to it"
    )


def _why_unreachable(address: str) -> str:
    """Why a server cannot be reached, as far as it can be told at once; otherwise empty.

    Without network, huggingface_hub would retry for half a minute.
    """
    parts = urlsplit(address)
    if getproxies().keys() & {parts.scheme, "all"}:
        return ""
    try:
        socket.getaddrinfo(parts.hostname, parts.port or parts.scheme)
    except OSError as error:
        return f"{parts.hostname}: {error.strerror or error}"
    return ""


# -- loading ---------------------------------------------------------------------------------------


def load_pretrained(cfg: CfgNode, model: nn.Module) -> None:
    """Load ``MODEL.TIMM.PRETRAINED`` into the backbone of a detector, if training starts from it.

    Raises:
        UsageError: if the file does not exist, cannot be read, or lacks weights of the backbone.
    """
    file = find_pretrained(cfg)
    if not file:
        return
    weights = read_timm_weights(file, trusted=cfg.MODEL.TRUST_WEIGHTS)
    load_timm_weights(cfg, timm_backbone(model), weights, file)
    logger.info("the backbone starts from %s (%s)", file, cfg.MODEL.TIMM.NAME)


def timm_backbone(model: nn.Module) -> TimmBackbone:
    """The timm model in a detector.

    Raises:
        UsageError: if its backbone is another one.
    """
    for module in model.modules():
        if isinstance(module, TimmBackbone):
            return module
    raise UsageError(
        "the backbone of this detector is not from timm: its MODEL.BACKBONE.NAME is another"
    )


def read_timm_weights(file: str, *, trusted: bool = False) -> dict[str, Tensor]:
    """Read a file of weights in timm's names, or of torchvision's MobileNetV2.

    Args:
        file: of ``torch.save`` or safetensors: the weights, or a training checkpoint of timm.
        trusted: as in :func:`.safe_loading.read_weights`.

    Raises:
        UsageError: if the file cannot be read or holds no weights.
    """
    content = read_weights(file, trusted=trusted)
    entry: Any = content
    for name in _ENTRIES:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            entry = content[name]
            break
    is_weights = isinstance(entry, Mapping) and entry
    if not is_weights or not all(isinstance(value, Tensor) for value in entry.values()):
        raise UsageError(f"{file} holds no weights of a timm model")
    weights = {name.removeprefix("module."): value for name, value in entry.items()}
    if "features.18.0.weight" in weights:
        return mobilenet_v2_from_torchvision(weights)
    return weights


def load_timm_weights(
    cfg: CfgNode, backbone: TimmBackbone, weights: Mapping[str, Tensor], file: str
) -> None:
    """Load weights in timm's names into a backbone.

    Args:
        cfg: config that the backbone was built from.
        backbone: on any device.
        weights: may lack layers that the backbone does not use, such as the classifier.
        file: for messages.

    Raises:
        UsageError: if the weights do not fit, or lack some that the backbone uses.
    """
    name = cfg.MODEL.TIMM.NAME
    by_flat_name = {
        flat_name(key): value for key, value in _whole_model(cfg, weights, file).items()
    }
    used = {key: by_flat_name[flat_name(key)] for key in backbone.net.state_dict()}
    missing = [key for key, value in used.items() if value.isnan().any()]
    if missing:
        raise UsageError(
            f"{file} does not fit MODEL.TIMM.NAME {name}: it lacks {len(missing)} weights of the "
            f"backbone, or they are NaN, such as {', '.join(missing[:3])}"
        )
    backbone.net.load_state_dict(used)


def _whole_model(cfg: CfgNode, weights: Mapping[str, Tensor], file: str) -> dict[str, Tensor]:
    """Weights of the whole timm model, by timm's loader; NaN where there are none."""
    import timm

    name, arguments = cfg.MODEL.TIMM.NAME, model_arguments(cfg)
    expected = timm.create_model(name, **arguments).state_dict()
    classifier = pretrained_settings(name).classifier or ()
    classifiers = (classifier,) if isinstance(classifier, str) else classifier
    prefixes = tuple(f"{layer}." for layer in classifiers)
    given = {key: value for key, value in weights.items() if not key.startswith(prefixes)}
    # timm renames the weights of older formats. Nothing is filled in for them but the classifier,
    # which may have another name in the file. So the file is tried as it is first.
    is_renamed = not given.keys() <= expected.keys()
    for key, value in expected.items():
        if key not in given and (key.startswith(prefixes) or not is_renamed):
            given[key] = value * torch.nan if value.is_floating_point() else value
    for content in (weights, given) if is_renamed else (given,):
        overlay = {"state_dict": dict(content), "custom_load": False}
        try:
            model = timm.create_model(
                name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments
            )
            return model.state_dict()
        except (KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())
    raise UsageError(f"{file} does not fit MODEL.TIMM.NAME {name}: {reason[:300]}")


def mobilenet_v2_from_torchvision(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of torchvision's MobileNetV2 to timm's names, without the classifier."""
    layers = {"0.0": "conv_stem", "0.1": "bn1", "18.0": "conv_head", "18.1": "bn2"}
    blocks = [(s, b) for s, count in enumerate(_MOBILENET_V2_BLOCKS) for b in range(count)]
    for number, (stage, block) in enumerate(blocks, start=1):
        parts = _EXPANDED if stage else _NOT_EXPANDED
        layers |= {f"{number}.conv.{k}": f"blocks.{stage}.{block}.{v}" for k, v in parts.items()}
    converted = {}
    for name, value in weights.items():
        layer, _, weight = name.removeprefix("features.").rpartition(".")
        if layer in layers:
            converted[f"{layers[layer]}.{weight}"] = value
    return converted


# -- writing ---------------------------------------------------------------------------------------


def write_timm_weights(file: Path, cfg: CfgNode, model: nn.Module) -> None:
    """Write the backbone of a detector in timm's names, as safetensors.

    Layers that feature extraction does not use, such as the classifier, are not in the file.

    Args:
        file: a name that ends with ``.safetensors``.
        cfg: config of the detector.
        model: the detector.

    Raises:
        UsageError: if the backbone is not from timm, or the name ends differently.
    """
    import timm

    if file.suffix != SAFETENSORS_SUFFIX:
        raise UsageError(f"the name of {file} must end with {SAFETENSORS_SUFFIX}")
    backbone = timm_backbone(model)
    name = cfg.MODEL.TIMM.NAME
    whole = timm.create_model(name, **model_arguments(cfg)).state_dict()
    names = {flat_name(key): key for key in whole}
    weights = {names[flat_name(k)]: v for k, v in backbone.net.state_dict().items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(file, weights, timm=name)
