"""Box regression in corner coordinates, in which the paper states its Gaussian boxes (Eq. 4)."""

from __future__ import annotations

import torch
from torch import Tensor


class CornerBoxTransform:
    """Codes a box as the offsets of its two corners over the proposal's width and height.

    ``(x1, y1, x2, y2)`` offsets, each divided by the proposal's width or height and multiplied by a
    weight. A drop-in for :class:`detectron2.modeling.box_regression.Box2BoxTransform`.

    Args:
        weights: factors of the x and of the y offsets; 10 brings typical errors near 1, where the
            variance of Eq. 5 can tell them apart.
    """

    def __init__(self, weights: tuple[float, float] = (10.0, 10.0)) -> None:
        # One for each coordinate: Detectron2 takes the number of coordinates from here.
        self.weights = (*weights, *weights)

    def get_deltas(self, src_boxes: Tensor, target_boxes: Tensor) -> Tensor:
        """Offsets from proposals to targets.

        Args:
            src_boxes, target_boxes: ``(N, 4)`` xyxy, absolute pixels of one view; the source boxes
                have an area.

        Returns:
            ``(N, 4)`` coded offsets.
        """
        return (target_boxes - src_boxes) / self._unit(src_boxes)

    def apply_deltas(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Boxes at the coded offsets from proposals.

        Args:
            deltas: ``(N, k*4)`` coded offsets, k boxes for each proposal.
            boxes: ``(N, 4)`` proposals, xyxy, absolute pixels.

        Returns:
            ``(N, k*4)`` xyxy, absolute pixels. Corners that the offsets drive past each other are
            put in order, so that every box is a valid one.
        """
        offsets = deltas.float().unflatten(1, (-1, 4)) * self._unit(boxes)[:, None]
        moved = boxes.to(offsets.dtype)[:, None] + offsets
        first, second = moved[..., :2], moved[..., 2:]
        ordered = torch.cat([torch.minimum(first, second), torch.maximum(first, second)], dim=-1)
        return ordered.flatten(1)

    def _unit(self, boxes: Tensor) -> Tensor:
        """``(N, 4)`` pixels that make one unit of offset."""
        width, height = (boxes[:, 2:] - boxes[:, :2]).float().unbind(dim=1)
        # Number by number: the host would wait for a copy of the weights to the device.
        unit_x, unit_y = width / self.weights[0], height / self.weights[1]
        return torch.stack([unit_x, unit_y, unit_x, unit_y], dim=1)
