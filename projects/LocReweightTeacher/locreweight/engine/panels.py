"""Draw and measure the teacher's pseudo-labels of fixed unlabeled images during training."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.structures import Instances

from ..data.mapper import ViewMapper
from ..data.monitored import MonitoredImages, MonitoredSample
from ..data.training_sets import TrainingSets
from ..data.transforms.views import project_to_strong_view
from ..methods.base import to_pseudo_labels
from ..modeling.meta_arch import SemiSupervisedRCNN
from ..run_files import PANEL_FOLDER
from ..visualization.drawing import (
    Layer,
    captioned,
    detection_labels,
    draw,
    explained,
    grid,
    quality_colors,
    quality_legend,
    rgb_pixels,
    save_picture,
)
from .matching import Match, agreement, agreement_by_quality, join, match

logger = logging.getLogger(__name__)

PANEL_IMAGES = 6
IMAGES_PER_ROW = 2
BEFORE_AFTER_IMAGES = 4
_SIDE = 300  # pixels of a view's longer side
_LARGE_SIDE = 400  # the same, for the pictures before and after mutual learning
_BATCH_SIZE = 8


@dataclass(frozen=True)
class PanelStyle:
    """Settings for drawing pseudo-labels.

    Attributes:
        class_names: names of the predicted classes.
        image_format: "RGB" or "BGR", the channel order of the views.
        highest_quality: upper bound of the localization quality.
    """

    class_names: list[str]
    image_format: str
    highest_quality: float

    @classmethod
    def from_config(cls, cfg: CfgNode, class_names: list[str]) -> PanelStyle:
        return cls(class_names, cfg.INPUT.FORMAT, 0.5 * cfg.SEMI.QUALITY_SCALE)


class PseudoLabelPanels(HookBase):
    """Hook that periodically draws pseudo-labels and compares them with known ground truth.

    Pictures ("panels") are written to ``OUTPUT_DIR/panels/iter_*.jpg``, their first row also to
    TensorBoard. At the end of burn-in and of training, the weak views of the first images are also
    written to ``OUTPUT_DIR/panels/teacher_*.jpg``, for a comparison. Precision, recall and IoU are
    logged as ``pseudo_truth/...``. The hook changes neither training nor its random state.
    """

    def __init__(
        self,
        teacher: SemiSupervisedRCNN,
        monitored: MonitoredImages,
        *,
        period: int,
        burn_in: int,
        threshold: float,
        output: Path,
        style: PanelStyle,
        amp_dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            teacher: model in evaluation mode.
            monitored: unlabeled images.
            period: number of iterations between panels. The last iterations of burn-in and of
                training also have one.
            burn_in: number of iterations of burn-in.
            threshold: detections above this score are pseudo-labels.
            output: ``OUTPUT_DIR``.
            style: settings for drawing.
            amp_dtype: data type in which the teacher labels for training; None for float32.
        """
        self._teacher = teacher
        self._monitored = monitored
        self._period = period
        self._burn_in = burn_in
        self._threshold = threshold
        self._folder = output / PANEL_FOLDER
        self._style = style
        self._amp_dtype = amp_dtype

    @classmethod
    def from_config(
        cls,
        cfg: CfgNode,
        teacher: SemiSupervisedRCNN,
        sets: TrainingSets,
        amp_dtype: torch.dtype,
    ) -> PseudoLabelPanels:
        return cls(
            teacher,
            MonitoredImages(sets.monitored, ViewMapper(cfg), seed=cfg.DATASETS.SPLIT_SEED),
            period=cfg.VIS_PERIOD,
            burn_in=cfg.SEMI.BURN_IN_ITERS,
            threshold=cfg.SEMI.PSEUDO_LABEL_THRESHOLD,
            output=Path(cfg.OUTPUT_DIR),
            style=PanelStyle.from_config(cfg, sets.class_names),
            amp_dtype=amp_dtype if cfg.SOLVER.AMP.ENABLED else None,
        )

    def after_step(self) -> None:
        iteration = self.trainer.iter + 1
        is_end = iteration == self._burn_in or self.trainer.is_last_iteration
        if iteration % self._period == 0 or is_end:
            self._evaluate(iteration, is_end=is_end)

    def _evaluate(self, iteration: int, *, is_end: bool) -> None:
        cells: list[np.ndarray] = []
        large: list[np.ndarray] = []
        matches: list[Match] = []
        for sample, detections in self._detect():
            pseudo_labels = detections[detections.scores > self._threshold]
            if len(cells) < PANEL_IMAGES:
                cells.append(draw_pseudo_labels(sample, pseudo_labels, self._style))
            if len(large) < BEFORE_AFTER_IMAGES:
                large.append(draw_weak_view(sample, pseudo_labels, self._style, _LARGE_SIDE))
            if sample.ground_truth is not None:
                matches.append(match(pseudo_labels, sample.ground_truth))
        caption = f"pseudo-labels after {iteration} iterations"
        self._save(draw_panel(cells, caption, self._style), f"iter_{iteration:07d}.jpg")
        if is_end:
            rows = [large[i : i + IMAGES_PER_ROW] for i in range(0, len(large), IMAGES_PER_ROW)]
            self._save(grid(rows), f"teacher_{iteration:07d}.jpg")
        # TensorBoard stores PNG. Encoding all rows would take longer than drawing them.
        first_row = draw_panel(cells[:IMAGES_PER_ROW], caption, self._style)
        self.trainer.storage.put_image("pseudo_labels", first_row.transpose(2, 0, 1))
        if matches:
            self._log_agreement(join(matches))

    def _save(self, picture: np.ndarray, name: str) -> None:
        file = self._folder / name
        try:
            save_picture(picture, file)
        except OSError as error:  # a full disk must not end training
            logger.error("cannot write %s, training continues without it: %s", file, error)

    def _detect(self) -> Iterator[tuple[MonitoredSample, Instances]]:
        """Yield each sample with the teacher's detections in its weak view, on the CPU."""
        # Without ground truth, only the images in the panel are needed.
        count = len(self._monitored) if self._monitored.has_ground_truth else PANEL_IMAGES
        count = min(count, len(self._monitored))
        for start in range(0, count, _BATCH_SIZE):
            samples = [self._monitored[i] for i in range(start, min(start + _BATCH_SIZE, count))]
            inputs = [{"image": sample.views.weak.image} for sample in samples]
            dtype = self._amp_dtype
            with torch.autocast(self._teacher.device.type, dtype=dtype, enabled=dtype is not None):
                teacher_output = self._teacher.detect(inputs)
            detections = (each.to("cpu") for each in teacher_output.detections)
            yield from zip(samples, detections, strict=True)

    def _log_agreement(self, matched: Match) -> None:
        overall = agreement(matched)
        named = {"": overall}
        for i, quarter in enumerate(agreement_by_quality(matched), 1):
            named[f"quality_quarter_{i}/"] = quarter
        scalars = {
            f"pseudo_truth/{prefix}{name}": value
            for prefix, values in named.items()
            for name, value in asdict(values).items()
            if not math.isnan(value)
        }
        self.trainer.storage.put_scalars(smoothing_hint=False, **scalars)
        logger.info(
            "pseudo-labels of %d monitored images: %d, precision %.3f, recall %.3f, mean IoU %.3f",
            len(self._monitored),
            len(matched.is_correct),
            overall.precision,
            overall.recall,
            overall.mean_iou,
        )


def draw_pseudo_labels(
    sample: MonitoredSample, detections: Instances, style: PanelStyle
) -> np.ndarray:
    """Draw the weak and the strong view of an image side by side, with its pseudo-labels.

    The color of a box is its localization quality. Known ground truth is drawn in the weak view.

    Args:
        sample: the views.
        detections: the pseudo-labels, in the weak view.
        style: settings for drawing.

    Returns:
        ``(H, W, 3)`` uint8, RGB.
    """
    # Projected as for the student. All detections given are above the threshold.
    labels = to_pseudo_labels(detections, score_threshold=-math.inf)
    projected = project_to_strong_view(labels, sample.views)
    colors = quality_colors(projected.gt_localization_quality, style.highest_quality)
    strong = [Layer(projected.gt_boxes.tensor, colors)]
    pixels = rgb_pixels(sample.views.strong.image, style.image_format)
    return grid([[draw_weak_view(sample, detections, style, _SIDE), draw(pixels, strong, _SIDE)]])


def draw_weak_view(
    sample: MonitoredSample, detections: Instances, style: PanelStyle, side: int
) -> np.ndarray:
    """Draw the weak view of an image with its pseudo-labels above its known ground truth.

    Args:
        sample: the views.
        detections: the pseudo-labels, in the weak view.
        style: settings for drawing.
        side: longer side of the picture in pixels.

    Returns:
        ``(H, W, 3)`` uint8, RGB.
    """
    detections = detections[detections.scores.argsort(stable=True)]
    colors = quality_colors(detections.localization_quality, style.highest_quality)
    texts = detection_labels(detections, style.class_names)
    layers = [Layer(detections.pred_boxes.tensor, colors, texts)]
    if sample.ground_truth is not None:
        layers.insert(0, Layer.of_ground_truth(sample.ground_truth))
    return draw(rgb_pixels(sample.views.weak.image, style.image_format), layers, side)


def draw_panel(cells: list[np.ndarray], caption: str, style: PanelStyle) -> np.ndarray:
    """Combine the pictures of several images, with a caption, a color scale and a legend, RGB."""
    rows = [cells[i : i + IMAGES_PER_ROW] for i in range(0, len(cells), IMAGES_PER_ROW)]
    panel = captioned(grid(rows), f"{caption}: weak view | strong view")
    scale = quality_legend(panel.shape[1], style.highest_quality)
    return explained(
        np.concatenate([panel, scale]),
        "Solid: pseudo-labels, with class, score and q. Dashed: ground truth, where it is known. "
        f"Classes: {', '.join(style.class_names)}",
    )
