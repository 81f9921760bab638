"""Weights as safetensors: numbers and text only, nothing that could run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

SUFFIX = ".safetensors"
_OURS = "locreweight"


def write_safetensors(file: Path, weights: Mapping[str, Tensor], **described: Any) -> None:
    """Write a state dict.

    Args:
        file: its name ends with ``.safetensors``.
        weights: by name.
        described: what a checkpoint says beside its ``model``; anything that json can hold.
    """
    # Each in a memory of its own, in order: the file has no views.
    separate = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in weights.items()
    }
    # One entry: of several the order, and with it the digest of the file, would differ each time.
    save_file(separate, file, metadata={_OURS: json.dumps(described)})


def read_safetensors(file: str) -> dict[str, Any]:
    """A checkpoint: ``model``, and beside it what was written with it, if it was written here.

    Raises:
        SafetensorError: if the file is damaged or another kind of file.
    """
    with safe_open(file, framework="pt") as opened:
        described = json.loads((opened.metadata() or {}).get(_OURS, "{}"))
        names = list(opened.keys())
        return {**described, "model": {name: opened.get_tensor(name) for name in names}}
