"""Draw boxes on images and combine pictures. All pictures are ``(H, W, 3)`` uint8 RGB."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.structures import Instances
from matplotlib import colormaps, font_manager
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import draw_bounding_boxes

Color = tuple[int, int, int]

WHITE: Color = (255, 255, 255)
GROUND_TRUTH_COLOR: Color = (0, 200, 90)
BORDER: Color = (40, 40, 40)  # between the cells of a grid
FONT = font_manager.findfont("DejaVu Sans")  # included in matplotlib
# From red over yellow to blue: color-blind people can tell these apart.
_QUALITY_MAP = colormaps["RdYlBu"]
_CLASS_MAP = colormaps["Set1"]


@dataclass(frozen=True)
class Layer:
    """Boxes that are drawn in the same way.

    Attributes:
        boxes: ``(N, 4)`` xyxy, absolute pixels of the image that they are drawn on.
        colors: a color for each box.
        labels: a text for each box; None for no texts.
        width: line width in pixels for pictures of up to 640 pixels; scaled up for larger ones.
    """

    boxes: Tensor
    colors: Sequence[Color]
    labels: Sequence[str] | None = None
    width: int = 2


def draw(image: np.ndarray, layers: Sequence[Layer], side: int = 480) -> np.ndarray:
    """Draw boxes on an image; later layers cover earlier ones.

    Args:
        image: ``(H, W, 3)`` uint8 RGB.
        layers: boxes. Boxes without area inside the image are not drawn.
        side: longer side of the picture in pixels. The image is resized before drawing, so that
            labels are readable on small images and pictures of large images are small files.
    """
    scale = side / max(image.shape[:2])
    shrinks = scale < 1
    size = tuple(max(1, round(length * scale)) for length in image.shape[1::-1])
    scaled = cv2.resize(image, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
    picture = torch.from_numpy(scaled).permute(2, 0, 1).contiguous()
    for layer in layers:
        limit = torch.tensor([size[0], size[1], size[0], size[1]]) - 1
        boxes = (layer.boxes.detach().cpu().float() * scale).clamp(min=0).minimum(limit)
        visible = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(dim=1).nonzero().flatten().tolist()
        if not visible:  # torchvision would warn
            continue
        picture = draw_bounding_boxes(
            picture,
            boxes[visible],
            labels=None if layer.labels is None else [layer.labels[i] for i in visible],
            colors=[layer.colors[i] for i in visible],
            width=max(1, layer.width * side // 640) if side > 640 else layer.width,
            font=FONT,
            font_size=max(11, side // 55),
            label_colors=[_readable_on(layer.colors[i]) for i in visible],
            fill_labels=layer.labels is not None,
        )
    return picture.permute(1, 2, 0).contiguous().numpy()


def quality_colors(quality: Tensor, highest: float = 0.5) -> list[Color]:
    """Map localization quality to colors: red up to half of ``highest``, blue at ``highest``.

    Before training, the quality is about half of the highest possible value (0.27 of 0.5).

    Args:
        quality: ``(N,)``.
        highest: upper bound of the quality.
    """
    return [_rgb(_QUALITY_MAP(2 * value / highest - 1)) for value in quality.tolist()]


def class_colors(classes: Tensor) -> list[Color]:
    """Return a color for each class index; nine colors repeat."""
    return [_rgb(_CLASS_MAP(label % 9)) for label in classes.tolist()]


def detection_labels(
    detections: Instances, class_names: list[str], *, quality: bool = True
) -> list[str]:
    """Return "class score" and, if ``quality``, "q quality" for each detection."""
    return [
        f"{class_names[label]} {score:.0%}" + (f" q {value:.2f}" if quality else "")
        for label, score, value in zip(
            detections.pred_classes.tolist(),
            detections.scores.tolist(),
            detections.localization_quality.tolist(),
            strict=True,
        )
    ]


def draw_detections(
    image: np.ndarray, detections: Instances, class_names: list[str], side: int, *, quality: bool
) -> np.ndarray:
    """Draw detections in the colors of their classes, with class and score.

    Args:
        image: ``(H, W, 3)`` uint8 RGB.
        detections: ``pred_boxes`` (absolute pixels of the image), ``pred_classes``, ``scores`` and
            ``localization_quality``.
        class_names: names of ``pred_classes``.
        side: longer side of the picture in pixels.
        quality: also show the localization quality.
    """
    labels = detection_labels(detections, class_names, quality=quality)
    colors = class_colors(detections.pred_classes)
    return draw(image, [Layer(detections.pred_boxes.tensor, colors, labels)], side)


def draw_ground_truth(
    image: np.ndarray, ground_truth: Instances, class_names: list[str], side: int
) -> np.ndarray:
    """Draw ground truth in the colors of its classes.

    Args:
        image: ``(H, W, 3)`` uint8 RGB.
        ground_truth: ``gt_boxes`` (absolute pixels of the image) and ``gt_classes``.
        class_names: names of ``gt_classes``.
        side: longer side of the picture in pixels.
    """
    names = [class_names[label] for label in ground_truth.gt_classes.tolist()]
    colors = class_colors(ground_truth.gt_classes)
    return draw(image, [Layer(ground_truth.gt_boxes.tensor, colors, names)], side)


def rgb_pixels(image: Tensor, image_format: str) -> np.ndarray:
    """Convert a model input to a picture.

    Args:
        image: ``(3, H, W)`` uint8.
        image_format: "RGB" or "BGR", the channel order of ``image``.
    """
    image = image if image_format == "RGB" else image.flip(0)
    return image.permute(1, 2, 0).contiguous().numpy()


def captioned(picture: np.ndarray, text: str, height: int = 22) -> np.ndarray:
    """Add a line of text above a picture; text that is too wide is cut off."""
    strip = Image.new("RGB", (picture.shape[1], height), BORDER)
    font = ImageFont.truetype(FONT, height - 9)
    ImageDraw.Draw(strip).text((4, height // 2), text, fill=WHITE, font=font, anchor="lm")
    return np.concatenate([np.asarray(strip), picture])


def quality_legend(width: int, highest: float = 0.5, height: int = 22) -> np.ndarray:
    """Draw the color scale of :func:`quality_colors`."""
    ramp = _QUALITY_MAP(np.linspace(0, 1, width))[None, :, :3] * 255
    strip = Image.fromarray(np.repeat(ramp, height, axis=0).astype(np.uint8))
    font = ImageFont.truetype(FONT, height - 9)
    pen, middle = ImageDraw.Draw(strip), height // 2
    low = f"localization quality: {highest / 2:g} or less"
    pen.text((4, middle), low, fill=WHITE, font=font, anchor="lm")
    pen.text((width - 4, middle), f"{highest:g}", fill=WHITE, font=font, anchor="rm")
    return np.asarray(strip)


def grid(rows: Sequence[Sequence[np.ndarray]], gap: int = 4) -> np.ndarray:
    """Arrange pictures in rows and columns, each centered in its cell."""
    widths = [
        max(row[i].shape[1] for row in rows if i < len(row))
        for i in range(max(len(row) for row in rows))
    ]
    lines = []
    for row in rows:
        height = max(cell.shape[0] for cell in row)
        cells = [_centered(cell, height, widths[i], gap) for i, cell in enumerate(row)]
        cells += [_centered(row[0][:0, :0], height, w, gap) for w in widths[len(row) :]]
        lines.append(np.concatenate(cells, axis=1))
    return np.concatenate(lines)


def save_picture(picture: np.ndarray, file: Path) -> None:
    """Write a picture in the format of the file's suffix, creating the folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lossy = file.suffix.lower() in (".jpg", ".jpeg", ".webp")
    settings: dict[str, Any] = {"quality": 88} if lossy else {}
    Image.fromarray(picture).save(file, **settings)


def _centered(cell: np.ndarray, height: int, width: int, gap: int) -> np.ndarray:
    above, left = (height - cell.shape[0]) // 2, (width - cell.shape[1]) // 2
    framed = np.empty((height + gap, width + gap, 3), np.uint8)
    framed[:] = BORDER
    framed[above : above + cell.shape[0], left : left + cell.shape[1]] = cell
    return framed


def _rgb(rgba: tuple[float, ...]) -> Color:
    red, green, blue = (round(255 * value) for value in rgba[:3])
    return red, green, blue


def _readable_on(color: Color) -> Color:
    """Return black or white, whichever has the higher contrast (ITU-R BT.601 luma)."""
    luma = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    return (0, 0, 0) if luma > 140 else WHITE
