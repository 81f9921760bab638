"""From a data set's record to augmented views."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import filter_empty_instances, read_image
from PIL import Image

from ..errors import UsageError
from .recipes import Recipe, build_recipe
from .views import UnlabeledSample, View, matrix_of


class UnreadableImage(UsageError):
    """An image file that is missing or cannot be decoded."""


class ViewMapper:
    """Makes the views of a recipe. Draws from numpy's global generator, as Detectron2 does."""

    @configurable
    def __init__(self, *, recipe: Recipe, image_format: str) -> None:
        """
        Args:
            recipe: the augmentations.
            image_format: "RGB" or "BGR", the order of channels that the model takes.
        """
        if image_format not in ("RGB", "BGR"):
            raise UsageError(
                f"INPUT.FORMAT must be RGB or BGR for colour operations, not {image_format}"
            )
        self.recipe = recipe
        self.image_format = image_format
        # Detectron2's own mapper, but in RGB: augmentations.py says why.
        self._labeled_mappers = [
            DatasetMapper(is_train=True, augmentations=view, image_format="RGB")
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
        with _reading(record["file_name"]):
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
        with _reading(record["file_name"]):
            image = read_image(record["file_name"], format="RGB")
            weak, weak_transforms = _augment(image, self.recipe.weak)
            if self.recipe.strong_on_weak:
                strong, strong_transforms = _augment(weak, self.recipe.strong)
                strong_transforms = weak_transforms + strong_transforms
            else:
                strong, strong_transforms = _augment(image, self.recipe.strong)
        size = image.shape[:2]
        return UnlabeledSample(
            file_name=record["file_name"],
            weak=View(self._tensor(weak), matrix_of(weak_transforms, size)),
            strong=View(self._tensor(strong), matrix_of(strong_transforms, size)),
        )

    def _tensor(self, image: np.ndarray) -> torch.Tensor:
        return self._ordered(torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))))

    def _ordered(self, image: torch.Tensor) -> torch.Tensor:
        return image if self.image_format == "RGB" else image.flip(0)


def _augment(
    image: np.ndarray, augmentations: list[T.Augmentation]
) -> tuple[np.ndarray, T.TransformList]:
    augmented = T.AugInput(image)
    transforms = T.AugmentationList(augmentations)(augmented)
    return augmented.image, transforms


@contextlib.contextmanager
def _reading(file_name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow raises each of these for files that it cannot decode; the last for damaged
        # headers, which promise images of absurd sizes.
        raise UnreadableImage(
            f"cannot read or augment the image {file_name}: {type(error).__name__}: {error}. "
            "If the file is damaged, repair or remove it"
        ) from error
