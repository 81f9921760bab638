"""Detections: the result of a predictor for one image, which can be filtered, drawn and saved."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from detectron2.structures import Instances
from PIL import Image

from ..errors import UsageError
from ..visualization.drawing import DEFAULT_STYLE, DrawingStyle, draw_detections, save_picture

SMALLEST_SIDE = 480  # smaller images are enlarged so that labels are readable


@dataclass(frozen=True, repr=False)
class Detections:
    """Objects that a detector found in one image.

    Arrays have one row per object, in the order of falling scores. In a notebook, the object shows
    itself as a picture.

    Attributes:
        image: ``(H, W, 3)`` uint8 RGB.
        instances: Detectron2's form of the detections, on the CPU: ``pred_boxes`` (xyxy, absolute
            pixels of the image), ``pred_classes``, ``scores`` and ``localization_quality``.
        class_names: of all classes of the model.
        has_localization_quality: False for detectors that were not trained to predict it.
        file: the image file; empty for images that were given as arrays.
    """

    image: np.ndarray
    instances: Instances
    class_names: list[str]
    has_localization_quality: bool
    file: str = ""

    @property
    def boxes(self) -> np.ndarray:
        """``(N, 4)`` float32, xyxy, absolute pixels of the image."""
        return self.instances.pred_boxes.tensor.numpy()

    @property
    def classes(self) -> np.ndarray:
        """``(N,)`` int64, indices into ``class_names``."""
        return self.instances.pred_classes.numpy()

    @property
    def names(self) -> list[str]:
        """Class name of each object."""
        return [self.class_names[label] for label in self.classes]

    @property
    def scores(self) -> np.ndarray:
        """``(N,)`` float32, probability of the class."""
        return self.instances.scores.numpy()

    @property
    def localization_quality(self) -> np.ndarray | None:
        """``(N,)`` float32 (Eq. 5); None if the detector was not trained to predict it."""
        return (
            self.instances.localization_quality.numpy() if self.has_localization_quality else None
        )

    def __len__(self) -> int:
        return len(self.instances)

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in Counter(self.names).most_common())
        return f"{self.file or 'image'}: {counts or 'no objects'}"

    def select(self, threshold: float = 0.0, classes: Collection[str] = ()) -> Detections:
        """Keep the objects whose score is above a threshold and whose class is one of ``classes``.

        Args:
            threshold: in [0, 1].
            classes: class names; empty for all classes.

        Raises:
            UsageError: if the model has no class of a name.
        """
        check_class_names(classes, self.class_names)
        keep = self.instances.scores > threshold
        if classes:
            keep &= torch.tensor([name in classes for name in self.names], dtype=torch.bool)
        return replace(self, instances=self.instances[keep])

    def draw(self, side: int = 0, style: DrawingStyle = DEFAULT_STYLE) -> np.ndarray:
        """Draw the objects with class, score and localization quality.

        Args:
            side: longer side of the picture in pixels. 0 for the size of the image, enlarged to
                480 if it is smaller.
            style: labels and line width.

        Returns:
            ``(H, W, 3)`` uint8 RGB.
        """
        return draw_detections(
            self.image,
            self.instances,
            self.class_names,
            side or max(SMALLEST_SIDE, *self.image.shape[:2]),
            quality=self.has_localization_quality,
            style=style,
        )

    def save(self, file: str | Path, style: DrawingStyle = DEFAULT_STYLE) -> None:
        """Draw the objects and write the picture; its folder is created."""
        save_picture(self.draw(style=style), Path(file))

    def crops(self) -> list[np.ndarray]:
        """Return the part of the image inside each box, rounded outwards to whole pixels."""
        height, width = self.image.shape[:2]
        corners = np.concatenate([np.floor(self.boxes[:, :2]), np.ceil(self.boxes[:, 2:])], axis=1)
        limits = np.clip(corners, 0, [width, height, width, height]).astype(int)
        return [self.image[y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)] for x1, y1, x2, y2 in limits]

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        Image.fromarray(self.draw()).save(content, "png")
        return content.getvalue()


def check_class_names(names: Collection[str], known: Collection[str]) -> None:
    """Check that the model has all classes that a user has named.

    Raises:
        UsageError: names the unknown classes.
    """
    if unknown := set(names) - set(known):
        raise UsageError(
            f"the model has no class {', '.join(map(repr, sorted(unknown)))}; its classes are "
            f"{', '.join(known)}"
        )
