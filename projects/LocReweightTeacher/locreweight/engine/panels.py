"""What the teacher makes of the same few unlabeled images while training goes on."""

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
from torch import Tensor

from ..data.mapper import ViewMapper
from ..data.monitored import MonitoredImages, MonitoredSample
from ..data.training_sets import TrainingSets
from ..data.transforms.views import View
from ..methods.base import to_pseudo_labels
from ..modeling.meta_arch import SemiSupervisedRCNN
from ..run_files import PANEL_FOLDER
from ..visualization.drawing import (
    TRUTH,
    Layer,
    captioned,
    detection_labels,
    draw,
    grid,
    quality_colors,
    quality_legend,
    save_picture,
)
from .matching import Match, agreement, agreement_by_quality, join, match
from .training_step import project_to_strong_view

logger = logging.getLogger(__name__)

PANEL_IMAGES = 6
IMAGES_A_ROW = 2
_SIDE = 300  # pixels of a view's longer side
_LOOK_AT_ONCE = 8  # images


@dataclass(frozen=True)
class PanelStyle:
    """How pseudo-labels are drawn.

    Attributes:
        class_names: of the detections.
        image_format: "RGB" or "BGR", the order of the views' channels.
        highest_quality: the upper bound of the localization quality.
    """

    class_names: list[str]
    image_format: str
    highest_quality: float

    @classmethod
    def from_config(cls, cfg: CfgNode, class_names: list[str]) -> PanelStyle:
        return cls(class_names, cfg.INPUT.FORMAT, 0.5 * cfg.SEMI.QUALITY_SCALE)


class PseudoLabelPanels(HookBase):
    """Draws and, where the truth is known, measures pseudo-labels of fixed images now and then.

    Panels go to ``OUTPUT_DIR/panels/iter_*.jpg`` and, their first row, to TensorBoard; measurements
    go to the metrics as ``pseudo_truth/...``. Nothing that training draws or computes is changed.
    """

    def __init__(
        self,
        teacher: SemiSupervisedRCNN,
        monitored: MonitoredImages,
        *,
        period: int,
        threshold: float,
        output: Path,
        style: PanelStyle,
        amp_dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            teacher: in evaluation mode.
            monitored: the images.
            period: of the looks, in iterations; the last iteration has one, too.
            threshold: a detection above this score is a pseudo-label.
            output: ``OUTPUT_DIR``.
            style: how the panels are drawn.
            amp_dtype: what the teacher computes in when it labels for training; None for float32.
        """
        self._teacher = teacher
        self._monitored = monitored
        self._period = period
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
            threshold=cfg.SEMI.PSEUDO_LABEL_THRESHOLD,
            output=Path(cfg.OUTPUT_DIR),
            style=PanelStyle.from_config(cfg, sets.class_names),
            amp_dtype=amp_dtype if cfg.SOLVER.AMP.ENABLED else None,
        )

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self._period == 0 or done == self.trainer.max_iter:
            self._look(done)

    def _look(self, done: int) -> None:
        cells: list[np.ndarray] = []
        matches: list[Match] = []
        for sample, found in self._seen():
            chosen = found[found.scores > self._threshold]
            if len(cells) < PANEL_IMAGES:
                cells.append(draw_pseudo_labels(sample, chosen, self._style))
            if sample.truth is not None:
                matches.append(match(chosen, sample.truth))
        caption = f"pseudo-labels after {done} iterations"
        panel = panel_of(cells, caption, self._style)
        try:
            save_picture(panel, self._folder / f"iter_{done:07d}.jpg")
        except OSError as error:  # a full disk is no reason to end a training
            logger.error("this panel of pseudo-labels is lost: %s", error)
        # TensorBoard keeps PNG: to encode the whole panel takes longer than to make it.
        part = panel_of(cells[:IMAGES_A_ROW], caption, self._style)
        self.trainer.storage.put_image("pseudo_labels", part.transpose(2, 0, 1))
        if matches:
            self._measure(join(matches))

    def _seen(self) -> Iterator[tuple[MonitoredSample, Instances]]:
        """Each sample with the teacher's detections in its weak view."""
        count = len(self._monitored) if self._monitored.truth_is_known else PANEL_IMAGES
        count = min(count, len(self._monitored))
        for start in range(0, count, _LOOK_AT_ONCE):
            samples = [self._monitored[i] for i in range(start, min(start + _LOOK_AT_ONCE, count))]
            inputs = [{"image": sample.views.weak.image} for sample in samples]
            dtype = self._amp_dtype
            with torch.autocast(self._teacher.device.type, dtype=dtype, enabled=dtype is not None):
                seen = self._teacher.detect(inputs)
            yield from zip(samples, (d.to("cpu") for d in seen.detections), strict=True)

    def _measure(self, matched: Match) -> None:
        named = {"": agreement(matched)}
        for i, quarter in enumerate(agreement_by_quality(matched), 1):
            named[f"quality_quarter_{i}/"] = quarter
        scalars = {
            f"pseudo_truth/{prefix}{name}": value
            for prefix, values in named.items()
            for name, value in asdict(values).items()
            if not math.isnan(value)
        }
        self.trainer.storage.put_scalars(smoothing_hint=False, **scalars)
        overall = named[""]
        logger.info(
            "pseudo-labels of %d monitored images: %d, precision %.3f, recall %.3f, mean IoU %.3f",
            len(self._monitored),
            len(matched.right),
            overall.precision,
            overall.recall,
            overall.mean_iou,
        )


def draw_pseudo_labels(sample: MonitoredSample, chosen: Instances, style: PanelStyle) -> np.ndarray:
    """Weak view | strong view of an image, with its pseudo-labels in both, RGB.

    The color of a box is its localization quality. Boxes of the truth, where it is known, are
    green, and in the weak view only.

    Args:
        sample: the views.
        chosen: detections in the weak view that are pseudo-labels.
        style: of the picture.
    """
    colors = quality_colors(chosen.localization_quality, style.highest_quality)
    texts = detection_labels(chosen, style.class_names)
    weak = [Layer(chosen.pred_boxes.tensor, colors, texts)]
    if sample.truth is not None:
        boxes = sample.truth.gt_boxes.tensor
        weak.insert(0, Layer(boxes, [TRUTH] * len(boxes)))
    # As the student gets them: all were chosen, so none is left out here.
    labels = to_pseudo_labels(chosen, score_threshold=-math.inf)
    carried = project_to_strong_view(labels, sample.views)
    kept = quality_colors(carried.gt_localization_quality, style.highest_quality)
    strong = [Layer(carried.gt_boxes.tensor, kept)]
    views, form = sample.views, style.image_format
    pictures = (
        draw(view_pixels(views.weak, form), weak, _SIDE),
        draw(view_pixels(views.strong, form), strong, _SIDE),
    )
    return grid([pictures])


def panel_of(cells: list[np.ndarray], caption: str, style: PanelStyle) -> np.ndarray:
    """Pictures of several images as one, with a caption and the colors' meaning, RGB."""
    rows = [cells[i : i + IMAGES_A_ROW] for i in range(0, len(cells), IMAGES_A_ROW)]
    panel = captioned(grid(rows), f"{caption}: weak view | strong view (green: truth, if known)")
    return np.concatenate([panel, quality_legend(panel.shape[1], style.highest_quality)])


def view_pixels(view: View, image_format: str) -> np.ndarray:
    """``(H, W, 3)`` uint8 RGB image of a view."""
    image: Tensor = view.image if image_format == "RGB" else view.image.flip(0)
    return image.permute(1, 2, 0).contiguous().numpy()
