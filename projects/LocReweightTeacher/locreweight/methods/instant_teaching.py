"""Instant-Teaching: mix unlabeled with labeled images, which the current weights have labeled.

Zhou et al., "Instant-Teaching: An End-to-End Semi-Supervised Object Detection Framework" (2021).
The student of the previous step makes the pseudo-labels: set ``SEMI.EMA_KEEP_RATE 0.0``. Half of
the strong views are mixed with a labeled image of the batch, either by a weighted average (mixup)
or by replacing a part (mosaic). The augmentations are ``INPUT.AUGMENTATION_POLICY
InstantTeachingPolicy``. This is the method without co-rectification.

Differences from the paper:

- A mixed image has the larger height and the larger width of its two images. In the authors' code
  it has the size of the unlabeled one, and proposals are clipped to that.
- The box losses are smooth L1. In the authors' code they are L1.
- Labels of mixup whose image has a weight of exactly 0 are dropped.
- Image sizes are those of the config, not 500 to 800 pixels.
"""

from __future__ import annotations

import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Boxes, Instances
from torch import Tensor

from ..losses.reweighting import reliability_weighted_cross_entropy
from .base import METHOD_REGISTRY, SampledProposals, SemiSupervisedMethod, StudentImage
from .mixing import common_size, labeled_image, pixel_mean, place, place_labels, select_fields

_MIN_VISIBLE_SIDE = 0.25  # of a box that is cut


@METHOD_REGISTRY.register()
class InstantTeaching(SemiSupervisedMethod):
    """Instant-Teaching with its published values.

    Attributes:
        mixing_probability: probability that an unlabeled image is mixed.
    """

    mixing_probability: float = 0.5

    @configurable
    def __init__(self, *, pixel_mean: Tensor, **kwargs: object) -> None:
        """
        Args:
            pixel_mean: ``(3,)`` color of areas that no image covers.
            kwargs: arguments of :class:`SemiSupervisedMethod`.
        """
        super().__init__(**kwargs)
        self.pixel_mean = pixel_mean

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        return super().from_config(cfg) | {"pixel_mean": pixel_mean(cfg)}

    def compose(self, images: list[StudentImage], labeled: list[dict]) -> list[StudentImage]:
        """Mix images at random; adds ``gt_weight``, the weight in the classification loss."""
        composed = []
        for image in images:
            _set_weight(image.pseudo_labels, 1.0)
            is_mixed = torch.rand(()).item() < self.mixing_probability
            composed.append(self._mix(image, labeled) if is_mixed else image)
        return composed

    def _mix(self, image: StudentImage, labeled: list[dict]) -> StudentImage:
        partner = labeled[int(torch.randint(len(labeled), ()))]
        other = labeled_image(partner, image.image.device)
        if torch.rand(()).item() < 0.5:
            # The ratio is distributed as Beta(1, 1), which is uniform.
            return mixup(image, other, torch.rand(()).item(), self.pixel_mean)
        axis = int(torch.randint(2, ()))
        side = common_size(image.image, other.image)[axis]
        cut = int(torch.randint(side // 4, max(side * 3 // 4, side // 4 + 1), ()))
        return mosaic(image, other, axis, cut, self.pixel_mean)

    def classification_loss(self, proposals: SampledProposals) -> Tensor:
        """Weight foreground proposals by the share of their object's image in a mixed image."""
        weight = torch.where(proposals.is_foreground, proposals.matched_gt_field("gt_weight"), 1.0)
        return reliability_weighted_cross_entropy(
            proposals.predictions.scores, proposals.labels, weight, per_sampled_proposal=True
        )


def mixup(first: StudentImage, second: StudentImage, ratio: float, fill: Tensor) -> StudentImage:
    """Average two images, and unite their labels.

    Args:
        first, second: the images. The upper left corners coincide.
        ratio: weight of the first image and of its labels, in [0, 1]; the second has the rest.
        fill: ``(3,)`` color of areas that only one image covers.
    """
    size = common_size(first.image, second.image)
    pixels, labels = torch.zeros((3, *size), device=first.image.device), []
    for x, weight in ((first, ratio), (second, 1 - ratio)):
        if weight > 0:
            pixels += weight * place(x.image, size, (0, 0), fill)
            labels.append(_set_weight(_place_at_origin(x, size), weight))
    return StudentImage(pixels, Instances.cat(labels), sample=None)


def mosaic(
    first: StudentImage, second: StudentImage, axis: int, cut: int, fill: Tensor
) -> StudentImage:
    """Replace the lower or right part of an image by that of another, and cut their labels.

    Args:
        first, second: the images. The upper left corners coincide.
        axis: 0 for an upper and a lower part, 1 for a left and a right part.
        cut: first row (column) of the second image, in pixels.
        fill: ``(3,)`` color of areas that the image of a part does not cover.
    """
    height, width = size = common_size(first.image, second.image)
    upper, lower = (place(x.image, size, (0, 0), fill) for x in (first, second))
    length = size[axis]
    pixels = [upper.narrow(axis + 1, 0, cut), lower.narrow(axis + 1, cut, length - cut)]
    regions = [(0, 0, width, cut), (0, cut, width, height)]
    if axis == 1:
        regions = [(0, 0, cut, height), (cut, 0, width, height)]
    labels = [
        _set_weight(cut_labels(_place_at_origin(x, size), region), 1.0)
        for x, region in zip((first, second), regions, strict=True)
    ]
    return StudentImage(torch.cat(pixels, dim=axis + 1), Instances.cat(labels), sample=None)


def cut_labels(labels: Instances, region: tuple[int, int, int, int]) -> Instances:
    """Clip the boxes of labels to a region, and drop those that lose too much.

    A box stays if more than a quarter of its width and more than a quarter of its height remain.

    Args:
        labels: with ``gt_boxes``.
        region: xyxy, absolute pixels.
    """
    x1, y1, x2, y2 = region
    before = labels.gt_boxes.tensor
    after = torch.stack(
        [before[:, 0::2].clamp(x1, x2), before[:, 1::2].clamp(y1, y2)], dim=2
    ).flatten(1)
    sides_before, sides_after = (x[:, 2:] - x[:, :2] for x in (before, after))
    stays = (sides_after > _MIN_VISIBLE_SIDE * sides_before).all(dim=1)
    cut = Instances(labels.image_size, **labels.get_fields())
    cut.gt_boxes = Boxes(after)
    return cut[stays.nonzero().squeeze(1)]


def _place_at_origin(image: StudentImage, size: tuple[int, int]) -> Instances:
    return place_labels(select_fields(image.pseudo_labels), size, (0, 0))


def _set_weight(labels: Instances, weight: float) -> Instances:
    labels.gt_weight = labels.gt_boxes.tensor.new_full((len(labels),), weight)
    return labels
