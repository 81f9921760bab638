"""Mappers from dataset records to model input and augmented views."""

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
from .transforms.fast_transforms import FastAugInput, channels_first
from .transforms.policies import AugmentationPolicy, build_augmentation_policy
from .transforms.views import UnlabeledSample, View, affine_matrix


class RecordMapper(DatasetMapper):
    """Detectron2's ``DatasetMapper``, for boxes only, with images read by :func:`.read_rgb`.

    Evaluation calls it on records. :class:`ViewMapper` calls :meth:`map_view` on images that it has
    read already.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        _check_image_format(cfg.INPUT.FORMAT)
        augmentations = resize_and_flip(cfg, is_train)
        return super().from_config(cfg, is_train) | {"augmentations": augmentations}

    def __call__(self, dataset_dict: dict) -> dict:
        """Read and transform the image of a record.

        Returns:
            the record with its ``image``, ``(3, H, W)`` uint8. In training it has ``instances``,
            otherwise neither these nor ``annotations``.
        """
        pixels = read_rgb(dataset_dict["file_name"])
        check_image_size(dataset_dict, pixels)
        # Detectron2's own AugInput: evaluation must see exactly the pixels that Detectron2 sees.
        augmented = T.AugInput(pixels)
        transforms = self.augmentations(augmented)
        return self._model_input(dataset_dict, augmented.image, transforms)

    def map_view(self, record: dict, source: TrainingImage) -> dict:
        """Make one augmented view of a record's image, in the format of :meth:`__call__`."""
        image, transforms = _augment(source.pixels, self.augmentations.augs)
        return self._model_input(record, image, source.scaling + transforms)

    def _model_input(self, record: dict, image: np.ndarray, transforms: T.TransformList) -> dict:
        """Combine a record with its transformed image, ``(H, W, 3)`` RGB."""
        annotations = record.get("annotations", [])
        # Detectron2 replaces values of an annotation but does not modify them. Shallow copies do.
        mapped = {**record, "annotations": [dict(annotation) for annotation in annotations]}
        mapped["image"] = channels_first(image, self.image_format)
        if self.is_train:
            self._transform_annotations(mapped, transforms, image.shape[:2])
        else:
            del mapped["annotations"]
        return mapped


class ViewMapper:
    """Make the augmented views of training images.

    Augmentations draw from numpy's global generator, as Detectron2's do.
    """

    @configurable
    def __init__(
        self,
        *,
        policy: AugmentationPolicy,
        image_format: str,
        reduced_decoding: bool = False,
        strong_views: int = 1,
    ) -> None:
        """
        Args:
            policy: the augmentations.
            image_format: "RGB" or "BGR", the channel order of the model input.
            reduced_decoding: decode JPEGs at a reduced size where all views are much smaller than
                the image.
            strong_views: number of strong views of an unlabeled image.
        """
        _check_image_format(image_format)
        self.strong_views = strong_views
        self.policy = policy
        self.image_format = image_format
        self._labeled_mappers = [
            RecordMapper(is_train=True, augmentations=view, image_format=image_format)
            for view in policy.labeled
        ]
        unlabeled = [policy.weak] if policy.strong_on_weak else [policy.weak, policy.strong]
        self._labeled_limit = _size_limit(policy.labeled) if reduced_decoding else SizeLimit()
        self._unlabeled_limit = _size_limit(unlabeled) if reduced_decoding else SizeLimit()

    @classmethod
    def from_config(cls, cfg: CfgNode, strong_views: int = 1) -> dict:
        return {
            "strong_views": strong_views,
            "policy": build_augmentation_policy(cfg),
            "image_format": cfg.INPUT.FORMAT,
            "reduced_decoding": cfg.INPUT.REDUCED_DECODING,
        }

    def labeled(self, record: dict) -> list[dict]:
        """Make the labeled views of an image, in Detectron2's format.

        Args:
            record: dataset record in Detectron2's format, with ``annotations``.

        Returns:
            one dict per view: ``image`` ``(3, H, W)`` uint8, ``instances`` with ``gt_boxes`` (xyxy,
            absolute pixels of the view) and ``gt_classes``.

        Raises:
            UnreadableImage: names the file.
        """
        with unreadable_image_errors(record["file_name"], ValueError):
            source = read_for_training(record["file_name"], self._labeled_limit)
            check_image_size(record, source)
            views = [mapper.map_view(record, source) for mapper in self._labeled_mappers]
        for view in views:
            view["instances"] = filter_empty_instances(view["instances"])
        return views

    def unlabeled(self, record: dict) -> UnlabeledSample:
        """Make the weak view and the strong views of an image.

        Args:
            record: dataset record; only ``file_name`` is used.

        Raises:
            UnreadableImage: names the file.
            ValueError: if the transforms of a view are not affine.
        """
        with unreadable_image_errors(record["file_name"], ValueError):
            source = read_for_training(record["file_name"], self._unlabeled_limit)
            resize_cache: dict = {}
            weak, weak_transforms = _augment(source.pixels, self.policy.weak, resize_cache)
            strong_views = [
                self._augment_strongly(source, weak, weak_transforms, resize_cache)
                for _ in range(self.strong_views)
            ]
        strong, *further_strong = (self._view(source, *view) for view in strong_views)
        return UnlabeledSample(
            file_name=record["file_name"],
            weak=self._view(source, weak, weak_transforms),
            strong=strong,
            further_strong=tuple(further_strong),
        )

    def _augment_strongly(
        self,
        source: TrainingImage,
        weak: np.ndarray,
        weak_transforms: T.TransformList,
        resize_cache: dict,
    ) -> tuple[np.ndarray, T.TransformList]:
        """Make one strong view; returns its pixels and its transforms from the source."""
        if not self.policy.strong_on_weak:
            return _augment(source.pixels, self.policy.strong, resize_cache)
        strong, transforms = _augment(weak, self.policy.strong)
        return strong, weak_transforms + transforms

    def _view(self, source: TrainingImage, image: np.ndarray, transforms: T.TransformList) -> View:
        matrix = affine_matrix(source.scaling + transforms, source.shape)
        return View(channels_first(image, self.image_format), matrix)


def _check_image_format(image_format: str) -> None:
    if image_format not in ("RGB", "BGR"):
        raise UsageError(
            f"INPUT.FORMAT must be RGB or BGR for color augmentations, got {image_format}"
        )


def _size_limit(views: Iterable[list[T.Augmentation]]) -> SizeLimit:
    """Return the largest size of the views. It is limited if all of them start with a resize."""
    limit = SizeLimit(0, 0)
    for view in views:
        first: Any = view[0] if view else None
        # Compare exact types: a subclass may need the pixels of the full-size image.
        # A short_edge_length of 0 means no resizing.
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
    pixels: np.ndarray, augmentations: list[T.Augmentation], resize_cache: dict | None = None
) -> tuple[np.ndarray, T.TransformList]:
    augmented = FastAugInput(pixels, resize_cache)
    transforms = T.AugmentationList(augmentations)(augmented)
    return augmented.image, transforms
