"""ROIAlign where it was asked to look, and on all cores of a CPU.

Torchvision's kernels use one core, whatever the number of threads. Channels do not know of each
other, so each thread runs torchvision's kernel on some of them, forward and backward, and the
results are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch
from detectron2.layers import ROIAlign
from torch import Tensor, nn
from torchvision.ops import roi_align


class ParallelROIAlign(ROIAlign):
    """Detectron2's, but boxes keep their precision, and all threads of a CPU work."""

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """
        Args:
            input: ``(N, C, H, W)`` feature maps.
            rois: ``(R, 5)`` index of the image, and the box xyxy in absolute pixels of the view.

        Returns:
            ``(R, C, h, w)``
        """
        if torch.is_autocast_enabled(input.device.type):
            # Detectron2 rounds coordinates to what feature maps come in: in half precision to a
            # pixel or, with bfloat16, to eight. Autocast raises both to float32 in any case.
            sampling = self.spatial_scale, self.sampling_ratio, self.aligned
            return roi_align(input, rois, self.output_size, *sampling)
        on_cpu = input.device.type == "cpu" and input.dtype is torch.float32
        # A graph that is exported is to hold one operation, and no threads.
        if not on_cpu or torch.get_num_threads() == 1 or torch.jit.is_tracing():
            return super().forward(input, rois)
        box = self.spatial_scale, *self.output_size
        return _ChannelsInParallel.apply(input, rois, box, (self.sampling_ratio, self.aligned))


def parallelize_roi_align(model: nn.Module) -> None:
    """Let all of Detectron2's ROIAlign modules in a model use all threads, in place."""
    for module in model.modules():
        if type(module) is ROIAlign:
            module.__class__ = ParallelROIAlign


class _ChannelsInParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, rois: Tensor, box: tuple, sampling: tuple) -> Tensor:
        rois = rois.to(features.dtype)
        ctx.save_for_backward(rois)
        ctx.settings = box, sampling, features.shape
        return _in_parallel(
            lambda part: torch.ops.torchvision.roi_align(part, rois, *box, *sampling), features
        )

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (rois,) = ctx.saved_tensors
        box, sampling, (images, _, height, width) = ctx.settings

        def kernel(part: Tensor) -> Tensor:
            shape = images, part.shape[1], height, width
            return torch.ops.torchvision._roi_align_backward(part, rois, *box, *shape, *sampling)

        return _in_parallel(kernel, gradient), None, None, None


def _in_parallel(kernel: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """``(A, C, ...) -> (B, C, ...)`` by a kernel that treats channels alike, on all threads."""

    # What a thread has to keep of gradients and precision is its own affair in each of them.
    @torch.no_grad()
    def run(part: Tensor) -> Tensor:
        return kernel(part)

    threads = torch.get_num_threads()
    # Made contiguous here, where one team of threads does it.
    parts = [part.contiguous() for part in tensor.chunk(threads, dim=1)]
    return torch.cat(list(_pool(threads).map(run, parts)), dim=1)


@lru_cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="roi_align")
