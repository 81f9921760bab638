"""ROIAlign that keeps full-precision boxes under AMP and uses all CPU threads."""

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
    """Detectron2's ``ROIAlign`` with full-precision boxes and on all CPU threads.

    Torchvision's CPU kernels use one thread. Here each thread runs the same kernel on some of the
    channels, forward and backward. The results are bitwise the same.
    """

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """
        Args:
            input: ``(N, C, H, W)`` feature maps.
            rois: ``(R, 5)`` image index, and box xyxy in absolute pixels of the view.

        Returns:
            ``(R, C, h, w)``
        """
        if torch.is_autocast_enabled(input.device.type):
            # Detectron2 converts the boxes to the dtype of the feature maps, which rounds
            # coordinates beyond 1024 to whole pixels in float16 and to multiples of 8 in bfloat16.
            # torchvision's function computes in float32 under autocast.
            sampling = self.spatial_scale, self.sampling_ratio, self.aligned
            return roi_align(input, rois, self.output_size, *sampling)
        on_cpu = input.device.type == "cpu" and input.dtype is torch.float32
        # An exported graph should contain the plain operator.
        if not on_cpu or torch.get_num_threads() == 1 or torch.jit.is_tracing():
            return super().forward(input, rois)
        box = self.spatial_scale, *self.output_size
        return _ROIAlignByChannels.apply(input, rois, box, (self.sampling_ratio, self.aligned))


def parallelize_roi_align(level_poolers: nn.ModuleList) -> nn.ModuleList:
    """Convert the ``ROIAlign`` layers of a ``ROIPooler`` to :class:`ParallelROIAlign`."""
    return nn.ModuleList(
        ParallelROIAlign(
            layer.output_size, layer.spatial_scale, layer.sampling_ratio, layer.aligned
        )
        if type(layer) is ROIAlign
        else layer
        for layer in level_poolers
    )


class _ROIAlignByChannels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, rois: Tensor, box: tuple, sampling: tuple) -> Tensor:
        rois = rois.to(features.dtype)
        ctx.save_for_backward(rois)
        ctx.settings = box, sampling, features.shape
        return _map_channels(
            lambda part: torch.ops.torchvision.roi_align(part, rois, *box, *sampling), features
        )

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (rois,) = ctx.saved_tensors
        box, sampling, (images, _, height, width) = ctx.settings

        def kernel(part: Tensor) -> Tensor:
            shape = images, part.shape[1], height, width
            return torch.ops.torchvision._roi_align_backward(part, rois, *box, *shape, *sampling)

        return _map_channels(kernel, gradient), None, None, None


def _map_channels(kernel: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Apply a channel-wise kernel ``(A, C, ...) -> (B, C, ...)`` to parts of the channels."""

    # Gradient mode is a setting of each thread.
    @torch.no_grad()
    def run(part: Tensor) -> Tensor:
        return kernel(part)

    threads = torch.get_num_threads()
    # Made contiguous in this thread, where PyTorch uses all threads for the copy.
    parts = [part.contiguous() for part in tensor.chunk(threads, dim=1)]
    return torch.cat(list(_thread_pool(threads).map(run, parts)), dim=1)


@lru_cache
def _thread_pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="roi_align")
