"""Unlabeled images that are looked at while training goes on, and their truth where it is known.

They stay the same from the first iteration to the last, and so do their views: what changes from
one look to the next is the teacher. Looking draws from no generator that training draws from.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances

from ..errors import UsageError
from ..geometry import warp_boxes
from .checks import RealPaths, check_boxes, check_classes
from .datasets.image_folders import ImageFiles
from .loader import Stream, StreamDataset, StreamPosition
from .mapper import ViewMapper
from .transforms.views import UnlabeledSample

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MonitoredSample:
    """The views of an unlabeled image; ``truth`` is in the frame of the weak one, or unknown."""

    views: UnlabeledSample
    truth: Instances | None


class MonitoredImages:
    """A fixed sample of unlabeled images, whose views are made anew, and alike, at each look."""

    def __init__(self, records: list[dict], mapper: ViewMapper, seed: int) -> None:
        """
        Args:
            records: ``file_name``, and ``annotations`` where the truth is known.
            mapper: makes the views.
            seed: of what the mapper draws.
        """
        self._records = {record["file_name"]: record for record in records}
        self._dataset = StreamDataset(records, records, mapper, seed)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> MonitoredSample:
        if index >= len(self):
            raise IndexError(index)
        views = self._dataset[StreamPosition(Stream.UNLABELED, index)]
        assert isinstance(views, UnlabeledSample)
        record = self._records[views.file_name]
        weak = views.weak
        truth = (
            ground_truth_in_view(record, weak.matrix, weak.image_size)
            if has_annotations(record)
            else None
        )
        return MonitoredSample(views, truth)

    @property
    def truth_is_known(self) -> bool:
        """Of all of them; that of none or of all is."""
        return all(has_annotations(record) for record in self._records.values())


def ground_truth_in_view(
    record: dict, matrix: torch.Tensor, image_size: tuple[int, int]
) -> Instances:
    """A record's annotations as they appear in a view.

    Args:
        record: in Detectron2's standard format.
        matrix: ``(3, 3)``, original image -> view.
        image_size: ``(height, width)`` of the view in pixels.

    Returns:
        ``gt_boxes`` (xyxy, absolute pixels of the view), ``gt_classes`` and ``gt_crowd``, which
        says of a box that it is neither to be found nor wrong to be found.
    """
    annotations = record["annotations"]
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    original = torch.tensor(np.array(boxes, dtype=np.float32).reshape(-1, 4))
    truth = Instances(
        image_size,
        gt_boxes=Boxes(warp_boxes(original, matrix, image_size)),
        gt_classes=torch.tensor([a["category_id"] for a in annotations], dtype=torch.int64),
        gt_crowd=torch.tensor([bool(a.get("iscrowd", 0)) for a in annotations], dtype=torch.bool),
    )
    return truth[truth.gt_boxes.nonempty(threshold=1.0)]


def has_annotations(record: dict) -> bool:
    """Whether a record says what is in its image, be it nothing."""
    return "annotations" in record


def choose_monitored(
    cfg: CfgNode,
    unlabeled: Sequence[dict],
    set_aside: list[dict],
    others: Mapping[str, Sequence[dict]],
    class_names: list[str],
) -> list[dict]:
    """Draw the images to watch: of those whose truth is known, if there are any.

    Args:
        cfg: says how many, and by which seed.
        unlabeled: records of all unlabeled images.
        set_aside: records of ``DATASETS.TRAIN`` that are used without their labels.
        others: the records of each of ``DATASETS.UNLABELED``.
        class_names: of the model.

    Returns:
        records, with ``annotations`` if all of them have some; empty if none are to be monitored.

    Raises:
        UsageError: if ``DATASETS.UNLABELED_TRUTH`` has other classes or other images.
    """
    count = cfg.TEST.MONITORED_IMAGES if cfg.VIS_PERIOD > 0 else 0
    if not count or not unlabeled:
        return []
    real_path = RealPaths()
    truth = {
        real_path(record["file_name"]): record
        for record in [*set_aside, *_annotated(cfg, others, class_names)]
    }
    order = np.random.RandomState(cfg.DATASETS.SPLIT_SEED).permutation(len(unlabeled))
    with_truth = (
        truth[path] | record
        for record in (unlabeled[index] for index in order)
        if (path := real_path(record["file_name"])) in truth
    )
    if truth and (chosen := list(islice(with_truth, count))):
        return check_boxes(chosen, drop_bad=True)
    if cfg.DATASETS.UNLABELED_TRUTH:
        raise UsageError(
            f"no image of DATASETS.UNLABELED_TRUTH {', '.join(cfg.DATASETS.UNLABELED_TRUTH)} is "
            "among the unlabeled ones; name the annotations of these, or leave the key empty"
        )
    return [unlabeled[index] for index in order[:count]]


def _annotated(
    cfg: CfgNode, others: Mapping[str, Sequence[dict]], class_names: list[str]
) -> Iterator[dict]:
    for name, records in others.items():
        # Detectron2 gives images of a set without annotations an empty list of them.
        if isinstance(records, ImageFiles) or not any(r.get("annotations") for r in records):
            continue
        if list(MetadataCatalog.get(name).get("thing_classes", [])) == class_names:
            yield from records
        else:
            logger.info("%s has other classes: pseudo-labels there are not measured", name)
    for name in cfg.DATASETS.UNLABELED_TRUTH:
        records = DatasetCatalog.get(name)
        classes = list(MetadataCatalog.get(name).get("thing_classes", []))
        check_classes({"the model": class_names, name: classes}, len(class_names))
        yield from records
