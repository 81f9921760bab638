"""A pretend device that shows on a CPU the mistakes that would appear only on a GPU.

Its tensors are in CPU memory, but cannot be mixed with CPU tensors, and operations that would make
the CPU wait for a GPU are counted. Import this module before the first backward pass, because
PyTorch looks for devices once. The import cannot be undone, so use a separate process.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any, TypeGuard

import detectron2
import torch
from torch import Tensor
from torch.library import Library, fallthrough_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

import locreweight

NAME = "pretend"
PACKAGES = [str(Path(package.__file__ or "").parent) + "/" for package in (locreweight, detectron2)]
# Operations that read the shape of a tensor, not its values.
SHAPE = {
    "size", "stride", "dim", "numel", "storage_offset", "is_contiguous", "sym_size", "sym_stride",
    "sym_numel", "sym_storage_offset", "sym_is_contiguous", "is_strides_like_format",
    "is_non_overlapping_and_dense",
}  # fmt: skip
COPIES = {"_to_copy", "copy_"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class _Backend(_DummyBackendModule):
    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


_setup_privateuseone_for_python_backend(NAME, _Backend())
DEVICE = torch.device(NAME, 0)
# Autocast has no effect here; the CPU's tests cover mixed precision.
_autocast = Library("_", "IMPL")
_autocast.fallback(fallthrough_kernel, "AutocastPrivateUse1")
# torch.tensor creates tensors on the CPU and copies them, as for a GPU.
torch._C._set_only_lift_cpu_tensors(True)
# Moving a module replaces its parameters instead of changing their memory.
torch.__future__.set_swap_module_params_on_conversion(True)


class FarTensor(Tensor):
    """A tensor on the device; ``near`` is the CPU tensor that holds its values."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> FarTensor:
        far: FarTensor = Tensor._make_wrapper_subclass(
            cls,
            near.shape,
            strides=near.stride(),
            dtype=near.dtype,
            device=DEVICE,
            dispatch_sizes_strides_policy="sizes",  # operations in place may change the shape
        )
        far.near = near
        return far

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in SHAPE:
            return func(args[0].near, *args[1:], **(kwargs or {}))
        raise AssertionError(f"{func} outside of {PretendDevice.__name__}")

    def tolist(self) -> Any:
        PretendDevice.current.note("tolist")
        return self.near.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"numpy does not read tensors on {self.device}")

    __array__ = numpy

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.near.__reduce_ex__(protocol)  # saved as a CPU tensor

    def __deepcopy__(self, memo: dict) -> FarTensor:
        return FarTensor(self.near.clone())


class PretendDevice(TorchDispatchMode):
    """Context in which the device exists.

    Attributes:
        waits: ``package: function: operation`` -> how often the CPU would have waited there.
    """

    current: PretendDevice

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        PretendDevice.current = self

    def note(self, operation: str) -> None:
        """Count a wait under the innermost function of the packages on the call stack."""
        frame = sys._getframe(1)
        while frame.f_back:
            code = frame.f_code
            for package in PACKAGES:
                if code.co_filename.startswith(package):
                    self.waits[f"{Path(package).name}: {code.co_name}: {operation}"] += 1
                    return
            frame = frame.f_back
        self.waits[f"elsewhere: {operation}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        leaves, structure = tree_flatten((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        to_far = any(is_far(t) for t in tensors)
        if to_far and name not in SHAPE:
            check_devices(func, args, tensors)
            if reads_numbers(func, args):
                self.note(name)
        if name == "copy_":
            to_far = is_far(args[0])
        elif kwargs.get("device") is not None:
            to_far = torch.device(kwargs["device"]).type == NAME
        if name in COPIES and is_far(tensors[-1]) != to_far and not is_asynchronous(args, kwargs):
            self.note("to the device" if to_far else "to the host")

        near_args, near_kwargs = structure.unflatten(t.near if is_far(t) else t for t in leaves)
        on_host = {"device": torch.device("cpu"), "pin_memory": False}
        result = func(*near_args, **{k: on_host.get(k, v) for k, v in near_kwargs.items()})
        # A tensor that was changed in place stays the same object.
        same = {id(t.near): t for t in tensors if is_far(t)}

        def far(x: Any) -> Any:
            if not (to_far and isinstance(x, Tensor)):
                return x
            return same[id(x)] if id(x) in same else FarTensor(x)

        return tree_map(far, result)


def is_far(x: Any) -> TypeGuard[FarTensor]:
    return isinstance(x, FarTensor)


def is_asynchronous(args: tuple, kwargs: dict) -> bool:
    """Whether a copy does not make the CPU wait."""
    return bool(kwargs.get("non_blocking")) or args[2:3] == (True,)


def check_devices(func: Any, args: tuple, tensors: list[Tensor]) -> None:
    """Raise RuntimeError where PyTorch does for tensors on a GPU and on the CPU."""
    name = func.overloadpacket.__name__
    if name in COPIES:
        return
    if name in INDEXING and is_far(args[0]):  # indices may be on the CPU
        tensors = [args[0], *args[2:3]]
    # Scalars may be on the CPU in elementwise operations.
    singles = torch.Tag.pointwise in func.tags or name in INDEXING
    for tensor in tensors:
        if not is_far(tensor) and not (singles and tensor.dim() == 0):
            raise RuntimeError(f"{func}: one tensor is on {DEVICE}, one is on the {tensor.device}")


def reads_numbers(func: Any, args: tuple) -> bool:
    """Whether the CPU needs values of the tensor to continue, such as the size of the result."""
    if func.overloadpacket.__name__ in INDEXING:
        indices = [i for i in args[1] if i is not None]
        if not all(is_far(i) for i in indices):
            return True  # they are copied to the device
        # The ones of a mask must be counted, unless all elements get the same value.
        is_fill = len(args) > 2 and args[2].numel() == 1
        return not is_fill and any(i.dtype in (torch.bool, torch.uint8) for i in indices)
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & {*func.tags})
