"""Models of a zoo by name, with Detectron2's functions and their meaning.

    LOCREWEIGHT_ZOO=https://example.org/zoo python
    >>> from locreweight import model_zoo
    >>> model = model_zoo.get("bccd-small", trained=True)

``tools/publish.py`` makes a zoo. Where it lies, and how files are fetched and checked, is in
:mod:`locreweight.checkpoint.zoo`. As in Detectron2, a name may end with ``.yaml``.
"""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from .checkpoint.checkpointer import TeacherCheckpointer, check_weights_exist, load_for_evaluation
from .checkpoint.zoo import (
    CONFIG,
    PREFIX,
    ZooEntry,
    address_of,
    check_name,
    fetch,
    find_entry,
    read_index,
)
from .config import load_config

__all__ = ["describe", "get", "get_checkpoint_url", "get_config", "get_config_file", "names"]


def names() -> list[str]:
    """All models of the zoo."""
    return sorted(read_index())


def describe(name: str) -> ZooEntry:
    """Class names, metrics, license and origin of a model.

    Raises:
        UsageError: here and below: if the zoo cannot be reached, has no such model, or has it in a
            damaged state.
    """
    return find_entry(name)


def get_config_file(name: str) -> str:
    """Path of a model's config on this machine."""
    return fetch(find_entry(name), CONFIG)


def get_checkpoint_url(name: str) -> str:
    """Where the zoo has a model's weights.

    For ``MODEL.WEIGHTS`` take ``locreweight://<name>``, which checks what it reads.
    """
    entry = find_entry(name)
    return address_of(entry, entry.weights)


def get_config(name: str, trained: bool = False) -> CfgNode:
    """The config of a model.

    Args:
        name: of the model.
        trained: ``MODEL.WEIGHTS`` are the trained ones; otherwise those that training began with.
    """
    address = PREFIX + check_name(name)
    cfg = load_config(f"{address}.yaml", [])
    if trained:
        cfg.MODEL.WEIGHTS = address
    return cfg


def get(name: str, trained: bool = False, device: str | None = None) -> nn.Module:
    """A model, in training mode as Detectron2's.

    Args:
        name: of the model.
        trained: see :func:`get_config`.
        device: in place of the config's; the CPU where there is no GPU.
    """
    cfg = get_config(name, trained)
    if device is not None or not torch.cuda.is_available():
        cfg.MODEL.DEVICE = device or "cpu"
    model = build_model(cfg)
    if trained:
        load_for_evaluation(cfg, model)
    elif cfg.MODEL.WEIGHTS:
        check_weights_exist(cfg.MODEL.WEIGHTS)
        TeacherCheckpointer(model, save_to_disk=False).load(cfg.MODEL.WEIGHTS)
    return model
