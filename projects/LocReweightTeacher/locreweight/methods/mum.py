"""MUM: Unbiased Teacher that mixes tiles of unlabeled images, and unmixes their features.

Kim et al., "MUM: Mix Image Tiles and UnMix Feature Tiles for Semi-Supervised Object Detection"
(2022). The strong views of a process are split into groups of four. Each image is cut into 4 x 4
tiles, and the images of a group exchange the tiles of the same place at random. After the backbone,
the tiles of all feature maps are put back, so that RPN and ROI head see the layout of each image
with its own pseudo-labels. Use the settings of Unbiased Teacher (:mod:`.unbiased_teacher`).

Differences from the paper:

- The differences of :mod:`.unbiased_teacher`.
- The batch is padded to multiples of 64 pixels, so that tiles of the three finest feature levels
  consist of whole cells. The other levels are resized where necessary, as in the authors' code.
- Images that do not fill a group of four are not mixed. The authors' code requires multiples.

Shapes:

    N: number of images
    G: number of groups
    S: number of images in a group
    T: number of tiles along one side of an image
"""

from __future__ import annotations

import torch
from detectron2.config import CfgNode, configurable
from detectron2.utils import comm
from torch import Tensor
from torch.nn import functional as F

from ..errors import UsageError
from .base import METHOD_REGISTRY
from .unbiased_teacher import UnbiasedTeacher


@METHOD_REGISTRY.register()
class MUM(UnbiasedTeacher):
    """Unbiased Teacher with mixed tiles.

    Attributes:
        group_size: number of images that exchange tiles.
        tiles: number of tiles along one side of an image.
    """

    group_size: int = 4
    tiles: int = 4

    @configurable
    def __init__(self, *, images_per_process: int, **kwargs: object) -> None:
        """
        Args:
            images_per_process: number of unlabeled images per iteration in each process.
            kwargs: arguments of :class:`SemiSupervisedMethod`.

        Raises:
            UsageError: if these are too few to mix.
        """
        super().__init__(**kwargs)
        if images_per_process < self.group_size:
            raise UsageError(
                f"SEMI.METHOD MUM mixes groups of {self.group_size} unlabeled images of the same "
                f"GPU, but each GPU has {images_per_process}: raise SOLVER.IMS_PER_BATCH_UNLABELED "
                "or use fewer GPUs"
            )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        processes = cfg.SOLVER.REFERENCE_WORLD_SIZE or comm.get_world_size()
        images = cfg.SOLVER.IMS_PER_BATCH_UNLABELED // processes
        return super().from_config(cfg) | {"images_per_process": images}

    def backbone_mixing(self, num_images: int) -> TileMixing:
        order = torch.rand(num_images // self.group_size, self.group_size, self.tiles, self.tiles)
        return TileMixing(order.argsort(dim=1))


class TileMixing:
    """Exchanges tiles between the images of a group.

    Attributes:
        order: ``(G, S, T, T)``: image of the group from which each image takes each tile.
        size_divisibility: see :class:`..modeling.meta_arch.BackboneMixing`.
    """

    def __init__(self, order: Tensor) -> None:
        """
        Args:
            order: for each group and tile a permutation of the S images.
        """
        self.order = order
        self.size_divisibility = 16 * order.shape[-1]  # whole cells in levels of stride 4, 8 and 16

    def mix(self, images: Tensor) -> Tensor:
        """Exchange the tiles of ``(N, C, H, W)`` images; H and W are multiples of T."""
        return self._exchange(images, self.order)

    def unmix(self, features: Tensor) -> Tensor:
        """Put the tiles of ``(N, C, h, w)`` feature maps back.

        If h or w is not a multiple of T, the map is resized to a smaller multiple, or T, meanwhile.
        """
        size = features.shape[-2:]
        tiles = self.order.shape[-1]
        divisible = tuple(max(side // tiles, 1) * tiles for side in size)
        inverse = self.order.argsort(dim=1)
        if divisible == tuple(size):
            return self._exchange(features, inverse)
        resized = F.interpolate(features, divisible, mode="bilinear")
        return F.interpolate(self._exchange(resized, inverse), tuple(size), mode="bilinear")

    def _exchange(self, x: Tensor, order: Tensor) -> Tensor:
        """Give each image the tiles of the images in ``order``, and leave the rest unchanged."""
        groups, group_size, tiles, _ = order.shape
        grouped = x[: groups * group_size].unflatten(0, (groups, group_size))
        tiled = grouped.unflatten(4, (tiles, -1)).unflatten(3, (tiles, -1))
        index = order.to(x.device, non_blocking=True)[:, :, None, :, None, :, None]
        mixed = torch.take_along_dim(tiled, index, dim=1)
        mixed = mixed.flatten(5, 6).flatten(3, 4).flatten(0, 1)
        return torch.cat([mixed, x[groups * group_size :]])
