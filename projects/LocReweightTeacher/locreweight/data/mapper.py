"""From a data set's record to augmented views."""

from __future__ import annotations

import copy

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import check_image_size, filter_empty_instances

from ..errors import UsageError
from .augmentations import resize_and_flip
from .images import naming, read_rgb
from .recipes import Recipe, build_recipe
from .views import UnlabeledSample, View, matrix_of


class RecordMapper(DatasetMapper):
    """Detectron2's, for boxes alone, but images are read by :func:`.images.read_rgb`."""

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        _check_format(cfg.INPUT.FORMAT)
        augmentations = resize_and_flip(cfg, is_train)
        return super().from_config(cfg, is_train) | {"augmentations": augmentations}

    def __call__(self, dataset_dict: dict) -> dict:
        """A record with its ``image``: in training with ``instances``, else without annotations."""
        record = copy.deepcopy(dataset_dict)
        pixels = read_rgb(record["file_name"])
        check_image_size(record, pixels)
        image, transforms = _augment(
            pixels if self.image_format == "RGB" else pixels[:, :, ::-1], self.augmentations.augs
        )
        record["image"] = _channels_first(image)
        if self.is_train:
            self._transform_annotations(record, transforms, image.shape[:2])
        else:
            record.pop("annotations", None)
        return record


class ViewMapper:
    """Makes the views of a recipe. Draws from numpy's global generator, as Detectron2 does."""

    @configurable
    def __init__(self, *, recipe: Recipe, image_format: str) -> None:
        """
        Args:
            recipe: the augmentations.
            image_format: "RGB" or "BGR", the order of channels that the model takes.
        """
        _check_format(image_format)
        self.recipe = recipe
        self.image_format = image_format
        # In RGB: augmentations.py says why.
        self._labeled_mappers = [
            RecordMapper(is_train=True, augmentations=view, image_format="RGB")
            for view in recipe.labeled
        ]

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        return {"recipe": build_recipe(cfg), "image_format": cfg.INPUT.FORMAT}

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
        with naming(record["file_name"], ValueError):
            samples = [mapper(record) for mapper in self._labeled_mappers]
        for sample in samples:
            sample["image"] = self._ordered(sample["image"])
            sample["instances"] = filter_empty_instances(sample["instances"])
        return samples

    def unlabeled(self, record: dict) -> UnlabeledSample:
        """The weak and the strong view of one image, drawn independently.

        Args:
            record: ``file_name``; everything else is ignored.

        Raises:
            UnreadableImage: names the file.
        """
        with naming(record["file_name"], ValueError):
            image = read_rgb(record["file_name"])
            weak, weak_transforms = _augment(image, self.recipe.weak)
            if self.recipe.strong_on_weak:
                strong, strong_transforms = _augment(weak, self.recipe.strong)
                strong_transforms = weak_transforms + strong_transforms
            else:
                strong, strong_transforms = _augment(image, self.recipe.strong)
        size = image.shape[:2]
        return UnlabeledSample(
            file_name=record["file_name"],
            weak=View(self._ordered(_channels_first(weak)), matrix_of(weak_transforms, size)),
            strong=View(self._ordered(_channels_first(strong)), matrix_of(strong_transforms, size)),
        )

    def _ordered(self, image: torch.Tensor) -> torch.Tensor:
        return image if self.image_format == "RGB" else image.flip(0)


def _check_format(image_format: str) -> None:
    if image_format not in ("RGB", "BGR"):
        raise UsageError(
            f"INPUT.FORMAT must be RGB or BGR for colour operations, not {image_format}"
        )


def _augment(
    image: np.ndarray, augmentations: list[T.Augmentation]
) -> tuple[np.ndarray, T.TransformList]:
    augmented = T.AugInput(image)
    transforms = T.AugmentationList(augmentations)(augmented)
    return augmented.image, transforms


def _channels_first(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image.transpose(2, 0, 1).copy())
