"""Read and write weight files without executing code that they contain.

Unpickling a file calls any function that the file names. Here, PyTorch files are read with
``weights_only``, ``.pkl`` files of the model zoo with an unpickler that only creates numeric
arrays, and safetensors files, which cannot contain code, with their own library.
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

SAFETENSORS_SUFFIX = ".safetensors"
_METADATA_KEY = "locreweight"


def read_weights(path: str, *, trusted: bool = False) -> Any:
    """Read a local weight file.

    Args:
        path: a ``.pkl`` file of numpy arrays, a ``.safetensors`` file, or a file written by
            ``torch.save`` with any other suffix.
        trusted: unpickle every object in the file, which can run arbitrary code.

    Returns:
        tensors on the CPU, numpy arrays, numbers and strings, nested in dictionaries and lists.

    Raises:
        UsageError: names the file and why it was not read.
    """
    try:
        if path.endswith(SAFETENSORS_SUFFIX):
            return read_safetensors(path)
        if not path.endswith(".pkl"):
            return torch.load(path, map_location="cpu", weights_only=not trusted)
        with open(path, "rb") as file:
            # Files written by Python 2 contain bytes as strings.
            unpickler = pickle.Unpickler if trusted else ArrayUnpickler
            return unpickler(file, encoding="latin1").load()
    except Exception as error:  # a file that is not a checkpoint can raise almost anything
        if _forbidden_global(error):
            raise UsageError(
                f"{path} was not read, because it {short_reason(error)}, which can run arbitrary "
                "code. If you trust the author of the file, set MODEL.TRUST_WEIGHTS True"
            ) from error
        raise UsageError(f"{path} is not a checkpoint: {short_reason(error)}") from error


def short_reason(error: Exception) -> str:
    """First sentence of the reason why a file could not be read."""
    name = _forbidden_global(error)
    if name:
        return f"asks for {name}"
    # PyTorch's message explains its default first and states the problem last.
    reason = re.search("WeightsUnpickler error: (.+)", str(error))
    message = reason[1] if reason else str(error)
    sentence = f"{type(error).__name__}: {message}".splitlines()[0].split(". ")[0]
    return sentence.removesuffix(": ")


def write_safetensors(file: Path, weights: Mapping[str, Tensor], **metadata: Any) -> None:
    """Write a state dict as safetensors.

    Args:
        file: a name that ends with ``.safetensors``.
        weights: tensors by name.
        metadata: further entries of the checkpoint; anything that JSON can represent.
    """
    # safetensors rejects tensors that share memory or are not contiguous.
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in weights.items()
    }
    # One metadata entry: with several, their order and the file's checksum would vary.
    save_file(copies, file, metadata={_METADATA_KEY: json.dumps(metadata)})


def read_safetensors(file: str) -> dict[str, Any]:
    """Read a checkpoint: ``model`` and, for files written by this project, its other entries.

    Raises:
        SafetensorError: if the file is damaged or has another format.
    """
    with safe_open(file, framework="pt") as stream:
        metadata = json.loads((stream.metadata() or {}).get(_METADATA_KEY, "{}"))
        names = list(stream.keys())
        return {**metadata, "model": {name: stream.get_tensor(name) for name in names}}


class ArrayUnpickler(pickle.Unpickler):
    """Unpickler for numeric arrays and Python's built-in containers; rejects everything else."""

    def find_class(self, module: str, name: str) -> Callable:
        # Module names of numpy 1 and Python 2.
        module = module.replace("numpy.core.", "numpy._core.").replace("__builtin__", "builtins")
        allowed = _ALLOWED.get((module, name))
        if allowed is None:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name} is not an array of numbers")
        return allowed


def _forbidden_global(error: Exception) -> str | None:
    """Name of the function or class that made an unpickler reject a file."""
    match = re.search(r"GLOBAL (\S+)", str(error))
    return match[1] if match and isinstance(error, pickle.UnpicklingError) else None


class _NumericType:
    """Stands in for ``numpy.dtype``.

    A pickle can set the flags of a real dtype so that numbers are read as object addresses.
    """

    def __init__(self, code: str, *_: object) -> None:
        self.dtype = np.dtype(code)
        if self.dtype.kind not in "biufc":
            raise pickle.UnpicklingError(f"GLOBAL numpy.dtype({code!r}) is not a numeric type")

    def __setstate__(self, state: tuple) -> None:
        _version, byte_order, *_flags = state
        self.dtype = self.dtype.newbyteorder(byte_order)


class _NumericArray(np.ndarray):
    """Array whose data is given as bytes."""

    def __setstate__(self, state: tuple) -> None:
        version, shape, numeric, fortran_order, data = state
        super().__setstate__((version, shape, numeric.dtype, fortran_order, data))


def _empty_array(*_: object) -> _NumericArray:
    return _NumericArray(0)


def _array_from_buffer(
    data: bytes, numeric: _NumericType, shape: tuple[int, ...], order: str
) -> np.ndarray:
    flat = np.frombuffer(data, numeric.dtype)
    return flat.reshape(shape, order="F" if order == "F" else "C").copy()


def _scalar(numeric: _NumericType, data: bytes | str) -> np.generic:
    as_bytes = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(as_bytes, numeric.dtype)[0]


def _encode(text: str, *_: object) -> bytes:
    """``codecs.encode``: pickles before protocol 3 store bytes as text."""
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Callable] = {
    ("numpy", "dtype"): _NumericType,
    ("numpy", "ndarray"): _NumericArray,
    ("numpy._core.multiarray", "_reconstruct"): _empty_array,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy._core.numeric", "_frombuffer"): _array_from_buffer,
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encode,
    **{("builtins", kind.__name__): kind for kind in (bytearray, bytes, complex, frozenset, set)},
}
