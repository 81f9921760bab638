"""Draw boxes on images and combine pictures. All pictures are ``(H, W, 3)`` uint8 RGB.

Boxes have a dark outline, to be visible on any background. Labels neither leave the picture nor
cover each other. Color-blind people can tell the colors apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from detectron2.structures import Instances
from matplotlib import colormaps, font_manager
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .labels import place_labels

Color = tuple[int, int, int]

WHITE: Color = (255, 255, 255)
OUTLINE: Color = (20, 20, 20)
BORDER: Color = (40, 40, 40)  # between the cells of a grid
FONT = font_manager.findfont("DejaVu Sans")  # included in matplotlib
_QUALITY_MAP = colormaps["RdYlBu"]
# The palette of Okabe and Ito (2008) without black.
CLASS_COLORS: tuple[Color, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (204, 121, 167),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
)
_DASH, _GAP = 8, 6  # pixels
_MARGIN = 3  # pixels around the text of a label


class LabelDetail(Enum):
    """What the labels of detections show."""

    NONE = "none"
    CLASS = "class"
    SCORE = "score"  # class, score and localization quality


@dataclass(frozen=True)
class DrawingStyle:
    """How detections are drawn.

    Attributes:
        labels: what the labels show.
        line_width: in pixels of the picture; 0 for a width that depends on the picture's size.
    """

    labels: LabelDetail = LabelDetail.SCORE
    line_width: int = 0


DEFAULT_STYLE = DrawingStyle()


@dataclass(frozen=True)
class Layer:
    """Boxes that are drawn in the same way.

    Attributes:
        boxes: ``(N, 4)`` xyxy, absolute pixels of the image that they are drawn on. Later ones
            cover earlier ones, and their labels are placed first.
        colors: a color for each box.
        labels: texts for each box, from the most detailed to the shortest; None for no texts.
        line_width: in pixels of the picture; 0 for a width that depends on the picture's size.
        dashed: dashed lines.
    """

    boxes: Tensor
    colors: Sequence[Color]
    labels: Sequence[Sequence[str]] | None = None
    line_width: int = 0
    dashed: bool = False

    @classmethod
    def of_ground_truth(
        cls, ground_truth: Instances, class_names: Sequence[str] | None = None
    ) -> Layer:
        """Dashed white boxes, to draw below or above other boxes.

        Args:
            ground_truth: ``gt_boxes`` (absolute pixels of the image) and ``gt_classes``.
            class_names: names of ``gt_classes`` for labels; None for no labels.
        """
        boxes = ground_truth.gt_boxes.tensor
        labels = None
        if class_names:
            labels = [[class_names[label]] for label in ground_truth.gt_classes.tolist()]
        return cls(boxes, [WHITE] * len(boxes), labels, dashed=True)


def draw(image: np.ndarray, layers: Sequence[Layer], side: int = 480) -> np.ndarray:
    """Draw boxes on an image; later layers cover earlier ones, and labels cover all boxes.

    If not all labels of the most detailed texts have room, all use shorter texts. Of the shortest
    texts, those without room are left out.

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
    picture = np.ascontiguousarray(scaled).copy()
    limit = np.array([*size, *size]) - 1
    labeled = []
    for layer in layers:
        width = layer.line_width or max(2, side // 320)
        width = max(1, width - 1) if layer.dashed else width  # dark gaps make them look wider
        boxes = np.clip(layer.boxes.detach().cpu().float().numpy() * scale, 0, limit)
        visible = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        for i in np.flatnonzero(visible).tolist():
            corners = boxes[i].round().astype(int).tolist()
            _draw_box(picture, corners, layer.colors[i], width, dashed=layer.dashed)
            if layer.labels is not None:
                labeled.append((corners, layer.labels[i], layer.colors[i]))
    font = ImageFont.truetype(FONT, max(11, side // 55))
    return _draw_labels(picture, labeled[::-1], font) if labeled else picture


def quality_colors(quality: Tensor, highest: float = 0.5) -> list[Color]:
    """Map localization quality to colors: red up to half of ``highest``, blue at ``highest``.

    Before training, the quality is about half of the highest possible value (0.27 of 0.5).

    Args:
        quality: ``(N,)``.
        highest: upper bound of the quality.
    """
    return [_rgb(_QUALITY_MAP(2 * value / highest - 1)) for value in quality.tolist()]


def class_colors(classes: Tensor) -> list[Color]:
    """Return a color for each class index; the colors repeat."""
    return [CLASS_COLORS[label % len(CLASS_COLORS)] for label in classes.tolist()]


def detection_labels(
    detections: Instances, class_names: Sequence[str], *, quality: bool = True
) -> list[list[str]]:
    """Return texts for each detection: "class score q quality", "class score" and "class".

    Args:
        detections: ``pred_classes``, ``scores`` and ``localization_quality``.
        class_names: names of ``pred_classes``.
        quality: if False, leave out the first text.
    """
    labels = []
    for label, score, value in zip(
        detections.pred_classes.tolist(),
        detections.scores.tolist(),
        detections.localization_quality.tolist(),
        strict=True,
    ):
        name = class_names[label]
        texts = [f"{name} {score:.0%} q {value:.2f}"] if quality else []
        labels.append([*texts, f"{name} {score:.0%}", name])
    return labels


def draw_detections(
    image: np.ndarray,
    detections: Instances,
    class_names: Sequence[str],
    side: int,
    *,
    quality: bool,
    style: DrawingStyle = DEFAULT_STYLE,
) -> np.ndarray:
    """Draw detections in the colors of their classes, high scores above low scores.

    Args:
        image: ``(H, W, 3)`` uint8 RGB.
        detections: ``pred_boxes`` (absolute pixels of the image), ``pred_classes``, ``scores`` and
            ``localization_quality``.
        class_names: names of ``pred_classes``.
        side: longer side of the picture in pixels.
        quality: also show the localization quality.
        style: labels and line width.
    """
    detections = detections[detections.scores.argsort(stable=True)]
    labels: Sequence[Sequence[str]] | None = detection_labels(
        detections, class_names, quality=quality
    )
    if style.labels is LabelDetail.CLASS:
        labels = [[class_names[label]] for label in detections.pred_classes.tolist()]
    elif style.labels is LabelDetail.NONE:
        labels = None
    colors = class_colors(detections.pred_classes)
    boxes = detections.pred_boxes.tensor
    return draw(image, [Layer(boxes, colors, labels, style.line_width)], side)


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
    names = [[class_names[label]] for label in ground_truth.gt_classes.tolist()]
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
    return np.concatenate([_text_line(text, picture.shape[1], height), picture])


def explained(picture: np.ndarray, text: str, height: int = 22) -> np.ndarray:
    """Add a text below a picture, in as many lines as it needs."""
    width = picture.shape[1]
    font = ImageFont.truetype(FONT, height - 9)
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width - 8:
            lines[-1] = longer
        else:
            lines.append(word)
    strips = [_text_line(line, width, height) for line in lines if line]
    return np.concatenate([picture, *strips])


def quality_legend(width: int, highest: float = 0.5, height: int = 22) -> np.ndarray:
    """Draw the color scale of :func:`quality_colors`."""
    ramp = _QUALITY_MAP(np.linspace(0, 1, width))[None, :, :3] * 255
    strip = Image.fromarray(np.repeat(ramp, height, axis=0).astype(np.uint8))
    font = ImageFont.truetype(FONT, height - 9)
    pen, middle = ImageDraw.Draw(strip), height // 2
    low = f"q, localization quality: {highest / 2:g} or less"
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


def _draw_box(
    picture: np.ndarray, corners: list[int], color: Color, width: int, *, dashed: bool
) -> None:
    """Draw a box with a dark outline; the gaps of dashed lines are dark."""
    x1, y1, x2, y2 = corners
    cv2.rectangle(picture, (x1, y1), (x2, y2), OUTLINE, width + 2)
    if not dashed:
        cv2.rectangle(picture, (x1, y1), (x2, y2), color, width)
        return
    for x in range(x1, x2, _DASH + _GAP):
        for y in (y1, y2):
            cv2.line(picture, (x, y), (min(x + _DASH, x2), y), color, width)
    for y in range(y1, y2, _DASH + _GAP):
        for x in (x1, x2):
            cv2.line(picture, (x, y), (x, min(y + _DASH, y2)), color, width)


def _draw_labels(
    picture: np.ndarray,
    labeled: Sequence[tuple[list[int], Sequence[str], Color]],
    font: ImageFont.FreeTypeFont,
) -> np.ndarray:
    """Draw the labels of boxes, given as corners, texts and color, most important ones first."""
    size = picture.shape[1], picture.shape[0]
    boxes = np.array([corners for corners, _, _ in labeled])
    height = sum(font.getmetrics()) + 2
    for level in range(max(len(texts) for _, texts, _ in labeled)):
        shown = [texts[min(level, len(texts) - 1)] for _, texts, _ in labeled]
        sizes = [(round(font.getlength(text)) + 2 * _MARGIN, height) for text in shown]
        corners = place_labels(boxes, sizes, size)
        if None not in corners:
            break
    image = Image.fromarray(picture)
    pen = ImageDraw.Draw(image)
    for corner, (width, _), text, (_, _, color) in zip(corners, sizes, shown, labeled, strict=True):
        if corner is None:
            continue
        x, y = corner
        pen.rectangle((x, y, x + width - 1, y + height - 1), fill=color, outline=OUTLINE)
        pen.text(
            (x + _MARGIN, y + height / 2), text, fill=_readable_on(color), font=font, anchor="lm"
        )
    return np.array(image)


def _text_line(text: str, width: int, height: int) -> np.ndarray:
    strip = Image.new("RGB", (width, height), BORDER)
    font = ImageFont.truetype(FONT, height - 9)
    ImageDraw.Draw(strip).text((4, height // 2), text, fill=WHITE, font=font, anchor="lm")
    return np.asarray(strip)


def _rgb(rgba: tuple[float, ...]) -> Color:
    red, green, blue = (round(255 * value) for value in rgba[:3])
    return red, green, blue


def _readable_on(color: Color) -> Color:
    """Return black or white, whichever has the higher contrast (ITU-R BT.601 luma)."""
    luma = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    return (0, 0, 0) if luma > 140 else WHITE
