"""Models of the zoo by name, with the interface of ``detectron2.model_zoo``.

    LOCREWEIGHT_ZOO=https://example.org/zoo python
    >>> from locreweight import model_zoo
    >>> model = model_zoo.get("bccd-small", trained=True)

Create a zoo with ``tools/publish.py``. :mod:`locreweight.checkpoint.zoo` locates, downloads and
verifies its files. As in Detectron2, a name can end with ``.yaml``.
"""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from torch import nn

from .checkpoint.checkpointer import TeacherCheckpointer
from .checkpoint.loading import check_weights_exist, load_for_evaluation
from .checkpoint.timm_weights import load_pretrained
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
from .modeling import build_detector

__all__ = ["describe", "get", "get_checkpoint_url", "get_config", "get_config_file", "names"]


def names() -> list[str]:
    """Names of all models in the zoo."""
    return sorted(read_index())


def describe(name: str) -> ZooEntry:
    """Class names, metrics, license and origin of a model.

    Raises:
        UsageError: if the zoo cannot be reached or lacks the model, or if files of the model are
            damaged. All functions of this module raise it.
    """
    return find_entry(name)


def get_config_file(name: str) -> str:
    """Local path of a model's config."""
    return fetch(find_entry(name), CONFIG)


def get_checkpoint_url(name: str) -> str:
    """Address of a model's weights in the zoo.

    For ``MODEL.WEIGHTS`` use ``locreweight://<name>``, which also verifies the checksum.
    """
    entry = find_entry(name)
    return address_of(entry, entry.weights)


def get_config(name: str, trained: bool = False) -> CfgNode:
    """Config of a model.

    Args:
        name: name of the model.
        trained: set ``MODEL.WEIGHTS`` to the trained weights. Otherwise it keeps the weights that
            the training started from.
    """
    address = PREFIX + check_name(name)
    cfg = load_config(f"{address}.yaml", [])
    if trained:
        cfg.MODEL.WEIGHTS = address
    return cfg


def get(name: str, trained: bool = False, device: str | None = None) -> nn.Module:
    """Build a model and load its weights. It is in training mode, as in Detectron2.

    Args:
        name: name of the model.
        trained: see :func:`get_config`.
        device: overrides the config; defaults to the CPU on machines without a GPU.
    """
    cfg = get_config(name, trained)
    if device is not None or not torch.cuda.is_available():
        cfg.MODEL.DEVICE = device or "cpu"
    model = build_detector(cfg)
    if trained:
        load_for_evaluation(cfg, model)
    elif cfg.MODEL.WEIGHTS:
        check_weights_exist(cfg.MODEL.WEIGHTS)
        TeacherCheckpointer(model, save_to_disk=False).load(cfg.MODEL.WEIGHTS)
    else:
        load_pretrained(cfg, model)
    return model
