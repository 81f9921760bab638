"""From a data set's record to augmented views."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import check_image_size, filter_empty_instances

from ..errors import UsageError
from .image_io import SizeLimit, TrainingImage, read_for_training, read_rgb, unreadable_image_errors
from .transforms.augmentations import ResizeShortestEdge, resize_and_flip
from .transforms.fast_transforms import FastInput, channels_first
from .transforms.policies import AugmentationPolicy, build_augmentation_policy
from .transforms.views import UnlabeledSample, View, matrix_of


class RecordMapper(DatasetMapper):
    """Detectron2's, for boxes alone, but images are read by :func:`.images.read_rgb`."""

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        _check_format(cfg.INPUT.FORMAT)
        augmentations = resize_and_flip(cfg, is_train)
        return super().from_config(cfg, is_train) | {"augmentations": augmentations}

    def __call__(self, dataset_dict: dict) -> dict:
        """A record with its ``image``: in training with ``instances``, else without annotations."""
        pixels = read_rgb(dataset_dict["file_name"])
        check_image_size(dataset_dict, pixels)
        # To the bit as Detectron2 does it: what is evaluated must not depend on this project.
        augmented = T.AugInput(pixels)
        transforms = self.augmentations(augmented)
        return self.record_of(dataset_dict, augmented.image, transforms)

    def view(self, record: dict, source: TrainingImage) -> dict:
        """One augmented view of a record's image, which was read before; else as a call."""
        image, transforms = _augment(source.pixels, self.augmentations.augs)
        return self.record_of(record, image, source.scaling + transforms)

    def record_of(self, record: dict, image: np.ndarray, transforms: T.TransformList) -> dict:
        """What the model takes of a record whose image was transformed, (H, W, 3) RGB."""
        annotations = record.get("annotations", [])
        # Annotations are changed in place, but nothing inside of them is: copies of one level do.
        mapped = {**record, "annotations": [dict(annotation) for annotation in annotations]}
        mapped["image"] = channels_first(image, self.image_format)
        if self.is_train:
            self._transform_annotations(mapped, transforms, image.shape[:2])
        else:
            del mapped["annotations"]
        return mapped


class ViewMapper:
    """Makes the views of a recipe. Draws from numpy's global generator, as Detectron2 does."""

    @configurable
    def __init__(
        self, *, recipe: AugmentationPolicy, image_format: str, reduced_decoding: bool = False
    ) -> None:
        """
        Args:
            recipe: the augmentations.
            image_format: "RGB" or "BGR", the order of channels that the model takes.
            reduced_decoding: JPEGs may be decoded at less than their size where all views are much
                smaller still.
        """
        _check_format(image_format)
        self.recipe = recipe
        self.image_format = image_format
        self._labeled_mappers = [
            RecordMapper(is_train=True, augmentations=view, image_format=image_format)
            for view in recipe.labeled
        ]
        unlabeled = [recipe.weak] if recipe.strong_on_weak else [recipe.weak, recipe.strong]
        self._labeled_limit = _size_limit(recipe.labeled) if reduced_decoding else SizeLimit()
        self._unlabeled_limit = _size_limit(unlabeled) if reduced_decoding else SizeLimit()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        return {
            "recipe": build_augmentation_policy(cfg),
            "image_format": cfg.INPUT.FORMAT,
            "reduced_decoding": cfg.INPUT.REDUCED_DECODING,
        }

    def labeled(self, record: dict) -> list[dict]:
        """The labeled views of one image, in Detectron2's format.

        Args:
            record: Detectron2's standard dictionary, with ``annotations``.

        Returns:
            one dictionary a view: ``image`` (3, H, W) uint8, ``instances`` with ``gt_boxes`` (xyxy,
            absolute pixels of that view) and ``gt_classes``.

        Raises:
            UnreadableImage: names the file.
        """
        with unreadable_image_errors(record["file_name"], ValueError):
            source = read_for_training(record["file_name"], self._labeled_limit)
            check_image_size(record, source)
            samples = [mapper.view(record, source) for mapper in self._labeled_mappers]
        for sample in samples:
            sample["instances"] = filter_empty_instances(sample["instances"])
        return samples

    def unlabeled(self, record: dict) -> UnlabeledSample:
        """The weak and the strong view of one image, drawn independently.

        Args:
            record: ``file_name``; everything else is ignored.

        Raises:
            UnreadableImage: names the file.
        """
        with unreadable_image_errors(record["file_name"], ValueError):
            source = read_for_training(record["file_name"], self._unlabeled_limit)
            resized: dict = {}
            weak, weak_transforms = _augment(source.pixels, self.recipe.weak, resized)
            if self.recipe.strong_on_weak:
                strong, strong_transforms = _augment(weak, self.recipe.strong)
                strong_transforms = weak_transforms + strong_transforms
            else:
                strong, strong_transforms = _augment(source.pixels, self.recipe.strong, resized)
        return UnlabeledSample(
            file_name=record["file_name"],
            weak=self._view(source, weak, weak_transforms),
            strong=self._view(source, strong, strong_transforms),
        )

    def _view(self, source: TrainingImage, image: np.ndarray, transforms: T.TransformList) -> View:
        matrix = matrix_of(source.scaling + transforms, source.shape)
        return View(channels_first(image, self.image_format), matrix)


def _check_format(image_format: str) -> None:
    if image_format not in ("RGB", "BGR"):
        raise UsageError(
            f"INPUT.FORMAT must be RGB or BGR for color operations, not {image_format}"
        )


def _size_limit(views: Iterable[list[T.Augmentation]]) -> SizeLimit:
    """How large views can become; they have a limit if each begins with being resized to one."""
    limit = SizeLimit(0, 0)
    for view in views:
        first: Any = view[0] if view else None
        # By the exact type: a class derived from these may look for details in the pixels.
        # Detectron2's length 0 stands for no change of size.
        if (
            type(first) not in (ResizeShortestEdge, T.ResizeShortestEdge)
            or 0 in first.short_edge_length
        ):
            return SizeLimit()
        limit = SizeLimit(
            max(limit.short, *first.short_edge_length), max(limit.long, first.max_size)
        )
    return limit


def _augment(
    pixels: np.ndarray, augmentations: list[T.Augmentation], resized: dict | None = None
) -> tuple[np.ndarray, T.TransformList]:
    image = FastInput(pixels, resized)
    transforms = T.AugmentationList(augmentations)(image)
    return image.image, transforms
