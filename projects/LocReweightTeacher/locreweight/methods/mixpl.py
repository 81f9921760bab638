"""MixPL: average unlabeled images in pairs, and add a mosaic of four of them.

Chen et al., "Mixed Pseudo Labels for Semi-Supervised Object Detection" (2023). A cache holds the
newest strong views with their pseudo-labels. Each unlabeled image is averaged with a cached one,
and the student learns the objects of both, so that an object that the teacher missed is less
distinct. A mosaic of four smaller cached images is an additional image, because the teacher finds
fewer of the small objects.

Differences from the authors' code (Faster R-CNN):

- The mosaic is as large as the largest unlabeled view of the batch. There it has a random size of
  800 to 1600 pixels per side, for views of 400 to 1333 pixels.
- Up to 4 patches are erased, once, by ``INPUT.AUGMENTATION_POLICY SoftTeacherPolicy``. There up to
  19 smaller ones are erased each time an image is used, and objects that are covered by 70 % are
  dropped.
- All processes share one cache, so that a run can be resumed with any number of them. Images are
  drawn from the whole cache. There each process has a cache, the older half is used for averages
  and the newer half for the mosaic.
- The losses of a batch count also if one of its images has no pseudo-labels. There the batch's
  unsupervised losses are then 0.
- Cached images are resized bilinearly, there with the nearest pixel.
- The EMA keep rate has the ramp of this project.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from torch import Tensor
from torch.nn import functional as F

from ..data.transforms.views import project_to_strong_view
from ..losses.reweighting import reliability_weighted_cross_entropy
from .base import (
    METHOD_REGISTRY,
    LabelingInputs,
    SampledProposals,
    SemiSupervisedMethod,
    StudentImage,
)
from .mixing import blank, common_size, pixel_mean, place, place_labels, select_fields


@METHOD_REGISTRY.register()
class MixPL(SemiSupervisedMethod):
    """MixPL with its published values.

    Attributes:
        cache_size: number of cached images. Nothing is mixed until the cache is full.
        mosaic_weight: weight of the losses in the mosaic; those in the other images have weight 1.
        further_fields: ``gt_*`` fields of pseudo-labels, besides boxes and classes, that a subclass
            needs in mixed images. Cached images are flipped, so :meth:`_fit` has to reorder fields
            with one value for each corner.
        cache: images and pseudo-labels on the CPU, newest last; the same in all processes. Each is
            a dict with ``image`` (3, H, W) uint8, ``boxes`` (N, 4) xyxy in absolute pixels,
            ``classes`` (N,), and the further fields.
    """

    further_images = 1  # the mosaic
    cache_size: int = 8
    mosaic_weight: float = 0.5
    further_fields: tuple[str, ...] = ()

    @configurable
    def __init__(self, *, pixel_mean: Tensor, **kwargs: object) -> None:
        """
        Args:
            pixel_mean: ``(3,)`` color of areas that no image covers.
            kwargs: arguments of :class:`SemiSupervisedMethod`.
        """
        super().__init__(**kwargs)
        self.pixel_mean = pixel_mean
        self.cache: list[dict[str, Tensor]] = []

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        return super().from_config(cfg) | {"pixel_mean": pixel_mean(cfg)}

    def compose(self, images: list[StudentImage], labeled: list[dict]) -> list[StudentImage]:
        """Average each image with a cached one, and add a mosaic."""
        if len(self.cache) < self.cache_size:
            return images
        device = images[0].image.device
        size = common_size(*(x.image for x in images))
        order = [i for _ in range(0, len(images), len(self.cache)) for i in self._shuffled()]
        partners = [self._fit(i, size, device) for i in order[: len(images)]]
        averages = [
            average(self._with_kept_fields(first), second, self.pixel_mean)
            for first, second in zip(images, partners, strict=True)
        ]
        quarter = max(size[0] // 2, 1), max(size[1] // 2, 1)
        parts = [self._fit(i, quarter, device) for i in self._shuffled()[:4]]
        # The losses are means over all images. These weights make them the mean over the averages
        # plus the weighted loss of the mosaic.
        count = len(averages) + 1
        return [
            *(replace(x, loss_weight=count / len(averages)) for x in averages),
            replace(
                mosaic(parts, quarter, self.pixel_mean), loss_weight=count * self.mosaic_weight
            ),
        ]

    def _shuffled(self) -> list[int]:
        return torch.randperm(len(self.cache)).tolist()

    def _fit(self, i: int, size: tuple[int, int], device: torch.device) -> StudentImage:
        """Return a cached image, flipped and resized to fit into a size."""
        cached = {name: x.to(device, non_blocking=True) for name, x in self.cache[i].items()}
        image, boxes = cached["image"], Boxes(cached["boxes"])
        labels = Instances(image.shape[1:], gt_boxes=boxes, gt_classes=cached["classes"])
        for name in self.further_fields:
            labels.set(name, cached[name])
        return flip_and_fit(image, labels, size)

    def _with_kept_fields(self, image: StudentImage) -> StudentImage:
        labels = select_fields(image.pseudo_labels, *self.further_fields)
        return replace(image, pseudo_labels=labels)

    def classification_loss(self, proposals: SampledProposals) -> Tensor:
        return reliability_weighted_cross_entropy(
            proposals.predictions.scores,
            proposals.labels,
            proposals.image_weight,
            per_sampled_proposal=True,
        )

    def box_loss(self, proposals: SampledProposals) -> Tensor:
        return proposals.weighted_box_loss(proposals.image_weight)

    # The cache

    def observe(self, inputs: LabelingInputs, pseudo_labels: list[Instances]) -> list[dict]:
        """Return the strong views of this process that may enter the cache."""
        share = math.ceil(self.cache_size / comm.get_world_size())
        newest = list(zip(inputs.samples, pseudo_labels, strict=True))[-share:]
        entries = []
        for sample, labels in newest:
            projected = project_to_strong_view(labels, sample)
            entries.append(
                {
                    "image": sample.strong.image.cpu(),
                    "boxes": projected.gt_boxes.tensor.cpu(),
                    "classes": projected.gt_classes.cpu(),
                    **{name: projected.get(name).cpu() for name in self.further_fields},
                }
            )
        return entries

    def update_state(self, observations: list[list[dict]]) -> None:
        entries = [entry for observed in observations for entry in observed]
        self.cache = (self.cache + entries)[-self.cache_size :]

    def state_dict(self) -> dict:
        return {"cache": list(self.cache)}

    def load_state_dict(self, state_dict: dict) -> None:
        self.cache = list(state_dict["cache"])


def flip_and_fit(image: Tensor, labels: Instances, size: tuple[int, int]) -> StudentImage:
    """Flip an image horizontally and resize it to the largest size that fits.

    Args:
        image: ``(3, h, w)``.
        labels: with ``gt_boxes``, xyxy, absolute pixels of the image. Other fields are not
            changed, also those with one value for each corner.
        size: ``(H, W)`` to fit into; the aspect ratio stays the same.
    """
    height, width = image.shape[1:]
    scale = min(size[0] / height, size[1] / width)
    new_height, new_width = max(int(height * scale), 1), max(int(width * scale), 1)
    pixels = image.float()
    if (new_height, new_width) != (height, width):
        pixels = F.interpolate(
            pixels[None], (new_height, new_width), mode="bilinear", antialias=True
        )[0]
    x1, y1, x2, y2 = labels.gt_boxes.tensor.unbind(dim=1)
    flipped = Boxes(torch.stack([width - x2, y1, width - x1, y2], dim=1))
    flipped.scale(new_width / width, new_height / height)
    fields = labels.get_fields() | {"gt_boxes": flipped}
    return StudentImage(pixels.flip(2), Instances((new_height, new_width), **fields), sample=None)


def average(first: StudentImage, second: StudentImage, fill: Tensor) -> StudentImage:
    """Average two images at random places of a canvas that fits both, and unite their labels.

    Args:
        first, second: the images.
        fill: ``(3,)`` color of areas that only one image covers.
    """
    size = common_size(first.image, second.image)
    pixels, labels = [], []
    for x in (first, second):
        height, width = x.image.shape[1:]
        corner = _up_to(size[1] - width), _up_to(size[0] - height)
        pixels.append(place(x.image, size, corner, fill))
        labels.append(place_labels(x.pseudo_labels, size, corner))
    return StudentImage(torch.stack(pixels).mean(dim=0), Instances.cat(labels), sample=None)


def mosaic(parts: list[StudentImage], quarter: tuple[int, int], fill: Tensor) -> StudentImage:
    """Place four images around the center of a canvas, and unite their labels.

    Args:
        parts: upper left, upper right, lower left and lower right image.
        quarter: ``(height, width)`` of a quarter of the canvas, which each part fits into.
        fill: ``(3,)`` color of areas that no image covers.
    """
    height, width = quarter
    size = 2 * height, 2 * width
    canvas = blank(size, fill, parts[0].image.device)
    labels = []
    for i, part in enumerate(parts):
        part_height, part_width = part.image.shape[1:]
        x = width if i % 2 else width - part_width
        y = height if i >= 2 else height - part_height
        canvas[:, y : y + part_height, x : x + part_width] = part.image
        labels.append(place_labels(part.pseudo_labels, size, (x, y)))
    return StudentImage(canvas, Instances.cat(labels), sample=None)


def _up_to(largest: int) -> int:
    return int(torch.randint(largest + 1, ()))
