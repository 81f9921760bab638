"""Reading files of weights that others made, without running anything that they hold.

A pickle names functions, and reading it calls them. Files of PyTorch are read as tensors only,
which PyTorch does itself; the model zoo's ``.pkl`` files are read as arrays of numbers only;
safetensors cannot hold anything else.
"""

from __future__ import annotations

import json
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UsageError


def read_weights(path: str, *, trusted: bool = False) -> Any:
    """What a local file holds.

    Args:
        path: ``.pkl``: pickled numpy arrays; ``.safetensors``; any other name: what ``torch.save``
            wrote.
        trusted: unpickle whatever the file holds, which can run code.

    Returns:
        tensors on the CPU, numpy arrays, numbers and strings, in dictionaries and lists.

    Raises:
        UsageError: names the file, and what it wanted to call or why it cannot be read.
    """
    try:
        if path.endswith(SUFFIX):
            return read_safetensors(path)
        if not path.endswith(".pkl"):
            return torch.load(path, map_location="cpu", weights_only=not trusted)
        with open(path, "rb") as file:
            # Files that Python 2 wrote hold their bytes as strings.
            unpickler = pickle.Unpickler if trusted else ArrayUnpickler
            return unpickler(file, encoding="latin1").load()
    except Exception as error:  # whatever a file that is no checkpoint makes its reader raise
        if _asked_for(error):
            raise UsageError(
                f"{path} was not read: it {short_reason(error)}, and a file that does so can run "
                "any code. Should you trust who made it, set MODEL.TRUST_WEIGHTS True"
            ) from error
        raise UsageError(f"{path} is not a checkpoint: {short_reason(error)}") from error


def short_reason(error: Exception) -> str:
    """Why a file could not be read: the first sentence of what was said."""
    wanted = _asked_for(error)
    if wanted:
        return f"asks for {wanted}"
    # PyTorch tells of its default first, and of the file at the end.
    reason = re.search("WeightsUnpickler error: (.+)", str(error))
    said = reason[1] if reason else str(error)
    sentence = f"{type(error).__name__}: {said}".splitlines()[0].split(". ")[0]
    return sentence.removesuffix(": ")


def _asked_for(error: Exception) -> str | None:
    """What a refused file wanted to call."""
    wanted = re.search(r"GLOBAL (\S+)", str(error))
    return wanted[1] if wanted and isinstance(error, pickle.UnpicklingError) else None


class ArrayUnpickler(pickle.Unpickler):
    """Makes arrays of numbers, and what Python itself is made of; refuses all else."""

    def find_class(self, module: str, name: str) -> Callable:
        # What numpy 1 and Python 2 called them.
        module = module.replace("numpy.core.", "numpy._core.").replace("__builtin__", "builtins")
        allowed = _ALLOWED.get((module, name))
        if allowed is None:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name} is not an array of numbers")
        return allowed


class _NumericType:
    """Stands in for ``numpy.dtype``.

    A pickle can set the flags of a real one so that numbers are taken for the addresses of objects.
    """

    def __init__(self, code: str, *_: object) -> None:
        self.dtype = np.dtype(code)
        if self.dtype.kind not in "biufc":
            raise pickle.UnpicklingError(f"GLOBAL numpy.dtype({code!r}) is not a type of numbers")

    def __setstate__(self, state: tuple) -> None:
        _version, byte_order, *_flags = state
        self.dtype = self.dtype.newbyteorder(byte_order)


class _NumericArray(np.ndarray):
    """An array whose content is given by bytes."""

    def __setstate__(self, state: tuple) -> None:
        version, shape, numeric, in_columns, content = state
        super().__setstate__((version, shape, numeric.dtype, in_columns, content))


def _empty_array(*_: object) -> _NumericArray:
    return _NumericArray(0)


def _array_of_buffer(
    content: bytes, numeric: _NumericType, shape: tuple[int, ...], order: str
) -> np.ndarray:
    in_order = np.frombuffer(content, numeric.dtype)
    return in_order.reshape(shape, order="F" if order == "F" else "C").copy()


def _scalar(numeric: _NumericType, content: bytes | str) -> np.generic:
    as_bytes = content.encode("latin1") if isinstance(content, str) else content
    return np.frombuffer(as_bytes, numeric.dtype)[0]


def _bytes_of(text: str, *_: object) -> bytes:
    """Before protocol 3 pickles held bytes as text."""
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Callable] = {
    ("numpy", "dtype"): _NumericType,
    ("numpy", "ndarray"): _NumericArray,
    ("numpy._core.multiarray", "_reconstruct"): _empty_array,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy._core.numeric", "_frombuffer"): _array_of_buffer,
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _bytes_of,
    **{("builtins", kind.__name__): kind for kind in (bytearray, bytes, complex, frozenset, set)},
}


# --------------------------------------------------------------------------------------------------
# Weights as safetensors: numbers and text only, nothing that could run.


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
