"""Unlabeled images that are monitored during training, with their ground truth if it is known.

The images and their views stay the same during the whole training, so that only the teacher
changes. Creating the views does not affect the random numbers of training.
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
from .checks import check_boxes, check_classes
from .datasets.packed_records import ImageFiles
from .datasets.real_paths import RealPathCache
from .datasets.shards import ShardedImages
from .loader import Stream, StreamDataset, StreamPosition
from .mapper import ViewMapper
from .transforms.views import UnlabeledSample

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MonitoredSample:
    """Views of an unlabeled image.

    Attributes:
        views: weak and strong view.
        ground_truth: in the frame of the weak view; None if it is not known.
    """

    views: UnlabeledSample
    ground_truth: Instances | None


class MonitoredImages:
    """Sequence of :class:`MonitoredSample`; each access creates the same views again."""

    def __init__(self, records: list[dict], mapper: ViewMapper, seed: int) -> None:
        """
        Args:
            records: ``file_name``, and ``annotations`` if the ground truth is known.
            mapper: creates the views.
            seed: seed of the views.
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
        ground_truth = (
            ground_truth_in_view(record, weak.matrix, weak.image_size)
            if has_annotations(record)
            else None
        )
        return MonitoredSample(views, ground_truth)

    @property
    def has_ground_truth(self) -> bool:
        """Whether the ground truth is known, of all images or of none."""
        return all(has_annotations(record) for record in self._records.values())


def ground_truth_in_view(
    record: dict, matrix: torch.Tensor, image_size: tuple[int, int]
) -> Instances:
    """Map a record's annotations to a view.

    Args:
        record: in Detectron2's standard format.
        matrix: ``(3, 3)``, original image -> view.
        image_size: ``(height, width)`` of the view in pixels.

    Returns:
        ``gt_boxes`` (xyxy, absolute pixels of the view), ``gt_classes``, and ``gt_crowd``, true for
        boxes that are ignored: detections of them are neither right nor wrong.
    """
    annotations = record["annotations"]
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    original = torch.tensor(np.array(boxes, dtype=np.float32).reshape(-1, 4))
    ground_truth = Instances(
        image_size,
        gt_boxes=Boxes(warp_boxes(original, matrix, image_size)),
        gt_classes=torch.tensor([a["category_id"] for a in annotations], dtype=torch.int64),
        gt_crowd=torch.tensor([bool(a.get("iscrowd", 0)) for a in annotations], dtype=torch.bool),
    )
    return ground_truth[ground_truth.gt_boxes.nonempty(threshold=1.0)]


def has_annotations(record: dict) -> bool:
    """Whether the objects of a record's image are known; the list of them can be empty."""
    return "annotations" in record


def choose_monitored(
    cfg: CfgNode,
    unlabeled: Sequence[dict],
    set_aside: list[dict],
    others: Mapping[str, Sequence[dict]],
    class_names: list[str],
) -> list[dict]:
    """Draw the images to monitor, from those whose ground truth is known if there are any.

    Args:
        cfg: ``TEST.MONITORED_IMAGES`` is the number, ``DATASETS.SPLIT_SEED`` the seed.
        unlabeled: records of all unlabeled images.
        set_aside: records of ``DATASETS.TRAIN`` that are used without their labels.
        others: data set of ``DATASETS.UNLABELED`` -> its records.
        class_names: classes of the model.

    Returns:
        records, all with or all without ``annotations``; empty if ``VIS_PERIOD`` is 0.

    Raises:
        UsageError: if ``DATASETS.UNLABELED_TRUTH`` has other classes or other images, or the
            unlabeled images are in shards.
    """
    count = cfg.TEST.MONITORED_IMAGES if cfg.VIS_PERIOD > 0 else 0
    if not count or not unlabeled:
        return []
    if cfg.DATASETS.UNLABELED_TRUTH and isinstance(unlabeled, ShardedImages):
        raise UsageError(
            "DATASETS.UNLABELED_TRUTH cannot be used with images in shards: leave it empty"
        )
    real_path = RealPathCache()
    annotated = {
        real_path(record["file_name"]): record
        for record in [*set_aside, *_annotated_records(cfg, others, class_names)]
    }
    # Of shards, images of the first are drawn, so that only one is downloaded.
    candidates = unlabeled.shard_size(0) if isinstance(unlabeled, ShardedImages) else len(unlabeled)
    order = np.random.RandomState(cfg.DATASETS.SPLIT_SEED).permutation(candidates)
    with_ground_truth = (
        annotated[path] | record
        for record in (unlabeled[index] for index in order)
        if (path := real_path(record["file_name"])) in annotated
    )
    if annotated and (chosen := list(islice(with_ground_truth, count))):
        return check_boxes(chosen, drop_bad=True)
    if cfg.DATASETS.UNLABELED_TRUTH:
        raise UsageError(
            f"no image of DATASETS.UNLABELED_TRUTH {', '.join(cfg.DATASETS.UNLABELED_TRUTH)} is an "
            "unlabeled image; set it to annotations of the unlabeled images, or leave it empty"
        )
    return [unlabeled[index] for index in order[:count]]


def _annotated_records(
    cfg: CfgNode, others: Mapping[str, Sequence[dict]], class_names: list[str]
) -> Iterator[dict]:
    for name, records in others.items():
        # Images of a COCO json without annotations have an empty list of annotations.
        if isinstance(records, ImageFiles | ShardedImages) or not any(
            r.get("annotations") for r in records
        ):
            continue
        if list(MetadataCatalog.get(name).get("thing_classes", [])) == class_names:
            # Without the images of a folder that nobody annotated.
            yield from (record for record in records if "annotations" in record)
        else:
            logger.info(
                "%s has other classes than the model: its pseudo-labels are not measured", name
            )
    for name in cfg.DATASETS.UNLABELED_TRUTH:
        records = DatasetCatalog.get(name)
        classes = list(MetadataCatalog.get(name).get("thing_classes", []))
        check_classes({"the model": class_names, name: classes}, len(class_names))
        yield from (record for record in records if "annotations" in record)
