"""Box regression in corner coordinates, which the paper's Gaussian boxes use (Eq. 4)."""

from __future__ import annotations

import torch
from torch import Tensor


class CornerBoxTransform:
    """Encode a box as the offsets of its two corners from a proposal.

    The offsets of ``(x1, y1, x2, y2)`` are divided by the proposal's width or height and multiplied
    by a weight. Drop-in replacement for
    :class:`detectron2.modeling.box_regression.Box2BoxTransform`.

    Args:
        weights: weights of the x and the y offsets. The default of 10 makes typical errors about
            1, a range in which the variances of Eq. 5 can differ.
    """

    def __init__(self, weights: tuple[float, float] = (10.0, 10.0)) -> None:
        # One weight for each coordinate: Detectron2 uses the length as the size of a box.
        self.weights = (*weights, *weights)

    def get_deltas(self, src_boxes: Tensor, target_boxes: Tensor) -> Tensor:
        """Encode target boxes relative to source boxes.

        Args:
            src_boxes, target_boxes: ``(N, 4)`` xyxy, absolute pixels of the same view. Source boxes
                must have a positive area.

        Returns:
            ``(N, 4)`` coded offsets.
        """
        return (target_boxes - src_boxes) / self._unit(src_boxes)

    def apply_deltas(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Decode boxes from coded offsets.

        Args:
            deltas: ``(N, k*4)`` coded offsets of k boxes for each proposal.
            boxes: ``(N, 4)`` proposals, xyxy, absolute pixels.

        Returns:
            ``(N, k*4)`` xyxy, absolute pixels. If the offsets move the corners past each other,
            their coordinates are swapped, so that x1 <= x2 and y1 <= y2.
        """
        offsets = deltas.float().unflatten(1, (-1, 4)) * self._unit(boxes)[:, None]
        moved = boxes.to(offsets.dtype)[:, None] + offsets
        first, second = moved[..., :2], moved[..., 2:]
        ordered = torch.cat([torch.minimum(first, second), torch.maximum(first, second)], dim=-1)
        return ordered.flatten(1)

    def variance_in_pixels(self, log_variance: Tensor, boxes: Tensor) -> Tensor:
        """Convert log-variances of coded offsets to variances of the corners.

        Args:
            log_variance: ``(N, k, 4)``, of k boxes for each proposal.
            boxes: ``(N, 4)`` proposals, xyxy, absolute pixels.

        Returns:
            ``(N, k, 4)`` in squared pixels.
        """
        return log_variance.exp() * self._unit(boxes)[:, None] ** 2

    def _unit(self, boxes: Tensor) -> Tensor:
        """``(N, 4)`` pixels per unit of the coded offset."""
        width, height = (boxes[:, 2:] - boxes[:, :2]).float().unbind(dim=1)
        # A tensor of the weights would have to be copied to the device, and the host would wait.
        unit_x, unit_y = width / self.weights[0], height / self.weights[1]
        return torch.stack([unit_x, unit_y, unit_x, unit_y], dim=1)
