"""Labeled, unlabeled and monitored images of a run: read, checked and split."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.build import (
    filter_images_with_only_crowd_annotations,
    print_instances_class_histogram,
)
from detectron2.utils import comm

from ..errors import UsageError
from ..run_files import CACHE_FOLDER
from .checks import (
    check_boxes,
    check_classes,
    check_images_decode,
    check_images_exist,
    check_test_set,
    common_images,
    describe_crowds,
    warn_of_repeated_images,
    with_configured_names,
    without_overlap,
    without_repeats,
)
from .datasets.catalog import expand_path, register, with_unannotated_images
from .datasets.packed_records import ImageFiles, PackedRecords
from .datasets.real_paths import RealPathCache
from .datasets.record_cache import RecordCache, garbage_collection_paused
from .datasets.shard_cache import DEFAULT_CACHE_DIR, ShardCache
from .datasets.shards import ShardedImages
from .datasets.splits import split_annotated
from .monitored import choose_monitored

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingSets:
    """Images of a run, as records in Detectron2's standard format.

    Attributes:
        labeled: records with annotations, packed so that loader workers share them.
        unlabeled: records without annotations, packed.
        class_names: in the order of the model's classes.
        monitored: some of the unlabeled images, with annotations if these are known. They are drawn
            and measured during training, but never trained on with their annotations.
    """

    labeled: PackedRecords
    unlabeled: ImageFiles | ShardedImages
    class_names: list[str]
    monitored: list[dict] = field(default_factory=list)

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """Number and checksum of the images of each stream, in order.

        Only file names count, not folders, so that data can be moved.
        """
        return {"labeled": _fingerprint(self.labeled), "unlabeled": _fingerprint(self.unlabeled)}

    def check_same(self, fingerprint: dict[str, str], allow_changed: bool) -> None:
        """Check that a resumed run has the same images as before.

        Number and order of the images determine which image is at which position of a stream.

        Args:
            fingerprint: fingerprint of the run before it was stopped.
            allow_changed: warn instead of raising.

        Raises:
            UsageError: if the images differ.
        """
        changed = [
            f"the {stream} ones were {before}, now {self.fingerprint[stream]}"
            for stream, before in fingerprint.items()
            if self.fingerprint[stream] != before
        ]
        if not changed:
            return
        problem = f"the training images have changed since this run stopped: {'; '.join(changed)}"
        if not allow_changed:
            raise UsageError(
                f"{problem}. Restore the data, continue with the changed data by "
                "DATASETS.CHECKS.ALLOW_CHANGED True, or start a new run in another OUTPUT_DIR"
            )
        logger.warning("%s", problem)


def register_datasets(cfg: CfgNode, *, training: bool = True) -> None:
    """Register the data sets of the config in Detectron2's catalogs.

    Args:
        cfg: the config.
        training: also register the data sets to train on, which evaluation does not need.

    Raises:
        UsageError: for an unknown name, or a missing file or folder.
    """
    data = cfg.DATASETS
    annotated = [*data.TEST, *data.TRAIN, *data.UNLABELED_TRUTH] if training else data.TEST
    add = partial(
        register,
        class_names=data.CLASS_NAMES,
        allow_outside=data.CHECKS.ALLOW_OUTSIDE_PATHS,
        cache=RecordCache(Path(cfg.OUTPUT_DIR, CACHE_FOLDER)),
        shard_cache=ShardCache(
            Path(expand_path(cfg.DATASETS.SHARDS.CACHE_DIR or DEFAULT_CACHE_DIR)),
            int(cfg.DATASETS.SHARDS.CACHE_GB * 1e9),
        ),
    )
    add(annotated)
    if training:
        add(data.UNLABELED, labeled=False)


def load_training_sets(cfg: CfgNode) -> TrainingSets:
    """Read, check and split ``DATASETS.TRAIN`` and ``DATASETS.UNLABELED``.

    Must be called on all processes.

    Raises:
        UsageError: for problems of the data that the user has to fix.
    """
    if not cfg.DATASETS.TRAIN:
        raise UsageError("DATASETS.TRAIN is empty: training needs at least one labeled image")
    with garbage_collection_paused():
        return _load_training_sets(cfg)


def _load_training_sets(cfg: CfgNode) -> TrainingSets:
    annotated = {name: list(_load(name)) for name in cfg.DATASETS.TRAIN}
    warn_of_repeated_images("DATASETS.TRAIN", chain(*annotated.values()))
    test_sets = load_test_sets(cfg)
    class_names = _checked_class_names(cfg)
    drawn, rest = split_annotated(cfg, annotated)
    labeled = _labeled_images(cfg, drawn)
    others = {name: with_unannotated_images(name, _load(name)) for name in cfg.DATASETS.UNLABELED}
    unlabeled = _unlabeled_images(cfg, labeled, [rest, *others.values()], test_sets)
    monitored = choose_monitored(cfg, unlabeled, rest, others, class_names)
    if cfg.DATASETS.CHECKS.DECODE_IMAGES:
        # Last, because it takes longest. Images without usable boxes are checked as well, since a
        # wrong image size can be the reason.
        check_images_decode([*drawn, *chain(*test_sets.values())])
    if comm.is_main_process():
        boxes = [annotation for record in labeled for annotation in record["annotations"]]
        # Passed as the boxes of a single image, which Detectron2 counts faster.
        print_instances_class_histogram([{"annotations": boxes}], class_names)
        logger.info("%d labeled and %d unlabeled images", len(labeled), len(unlabeled))
    return TrainingSets(PackedRecords(labeled), unlabeled, class_names, monitored)


def _load(name: str) -> Sequence[dict]:
    """Read a data set. Must be called on all processes."""
    # Of a COCO json, the first process of each machine writes the cache that the others read.
    is_shared = name.startswith("coco:")
    if is_shared and comm.get_local_rank() != 0:
        comm.synchronize()
    try:
        records = DatasetCatalog.get(name)
    finally:
        if is_shared and comm.get_local_rank() == 0:
            comm.synchronize()
    if not records:
        raise UsageError(f"the data set {name} has no images")
    return records


def check_test_sets(cfg: CfgNode) -> None:
    """Run the checks of ``DATASETS.TEST`` that training runs, including those of the images.

    Must be called on all processes.

    Raises:
        UsageError: for problems of the data that the user has to fix.
    """
    if not cfg.DATASETS.TEST:
        raise UsageError("DATASETS.TEST is empty: there is no data set to evaluate on")
    test_sets = load_test_sets(cfg)
    if cfg.DATASETS.CHECKS.DECODE_IMAGES:
        check_images_decode([*chain(*test_sets.values())])


def load_test_sets(cfg: CfgNode) -> dict[str, list[dict]]:
    """Read ``DATASETS.TEST`` and check its boxes and that its images exist.

    Returns:
        data set -> records.

    Raises:
        UsageError: for problems of the data that the user has to fix.
    """
    test_sets = {name: list(_load(name)) for name in cfg.DATASETS.TEST}
    for name, records in test_sets.items():
        check_test_set(name, records)
        warn_of_repeated_images(name, records)
        check_images_exist(records)
    return test_sets


def _checked_class_names(cfg: CfgNode) -> list[str]:
    names = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    class_names = {n: list(MetadataCatalog.get(n).get("thing_classes", [])) for n in names}
    for name, classes in class_names.items():
        if not classes:
            raise UsageError(f"{name} has no annotations; put it into DATASETS.UNLABELED")
    check_classes(with_configured_names(cfg, class_names), cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    return class_names[cfg.DATASETS.TRAIN[0]]


def _labeled_images(cfg: CfgNode, records: list[dict]) -> list[dict]:
    crowds = describe_crowds("the labeled images", records, "They are not trained on")
    if crowds:
        logger.info("%s", crowds)
    labeled = check_boxes(records, drop_bad=cfg.DATASETS.CHECKS.DROP_BAD_BOXES)
    check_images_exist(labeled)
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        labeled = filter_images_with_only_crowd_annotations(labeled)
    # Also checked if images without boxes are kept, since nothing could be learned.
    if not any(a.get("iscrowd", 0) == 0 for record in labeled for a in record["annotations"]):
        raise UsageError(
            f"no labeled image of {', '.join(cfg.DATASETS.TRAIN)} has a box to train on: all "
            "annotations are missing or were left out, or DATASETS.LABELED_PERCENT selected only "
            "images without boxes"
        )
    return labeled


def _unlabeled_images(
    cfg: CfgNode,
    labeled: list[dict],
    parts: Sequence[Sequence[dict]],
    test_sets: dict[str, list[dict]],
) -> ImageFiles | ShardedImages:
    real_paths = RealPathCache()
    unlabeled: ImageFiles | ShardedImages
    if shards := [part for part in parts if isinstance(part, ShardedImages)]:
        unlabeled = _only_shards(shards, [part for part in parts if part])
    else:
        files = ImageFiles.concatenate([ImageFiles.of_records(part) for part in parts])
        files = without_repeats(files, real_paths)
        exclude = cfg.DATASETS.EXCLUDE_LABELED
        files = without_overlap(labeled, files, real_paths, exclude=exclude)
        unlabeled = _without_test_images(cfg, files, test_sets, real_paths)
    _warn_of_labeled_test_images(labeled, test_sets, real_paths)
    _check_enough_unlabeled(cfg, unlabeled)
    return unlabeled


def _only_shards(shards: list[ShardedImages], parts: Sequence[Sequence[dict]]) -> ShardedImages:
    if len(parts) > 1:
        raise UsageError(
            "shards: cannot be combined with other unlabeled images, such as those that "
            "DATASETS.LABELED_PERCENT makes unlabeled: pack all of them with tools/make_shards.py "
            "into one index"
        )
    [images] = shards
    images.check_cache()
    logger.info(
        "images in shards are not compared with the labeled and test images: pack only others"
    )
    return images


def _without_test_images(
    cfg: CfgNode,
    unlabeled: ImageFiles,
    test_sets: dict[str, list[dict]],
    real_paths: RealPathCache,
) -> ImageFiles:
    common = common_images(chain(*test_sets.values()), unlabeled, real_paths)
    if not common:
        return unlabeled
    if cfg.DATASETS.EXCLUDE_LABELED:
        logger.info("left out %d unlabeled images that are test images", len(common))
        return unlabeled.without(common)
    logger.warning(
        "%d unlabeled images are also in the test sets %s: test scores will be optimistic. Leave "
        "them out with DATASETS.EXCLUDE_LABELED True",
        len(common),
        ", ".join(test_sets),
    )
    return unlabeled


def _warn_of_labeled_test_images(
    labeled: list[dict], test_sets: dict[str, list[dict]], real_paths: RealPathCache
) -> None:
    """Not an error: training and testing on the same few images shows that training works."""
    images = ImageFiles.of_records(labeled)
    common = common_images(chain(*test_sets.values()), images, real_paths)
    if common:
        logger.warning(
            "%d of %d labeled images are also in the test sets %s: test scores will be optimistic. "
            "Remove them from DATASETS.TRAIN or DATASETS.TEST",
            len(common),
            len(labeled),
            ", ".join(test_sets),
        )


def _check_enough_unlabeled(cfg: CfgNode, unlabeled: Sequence[dict]) -> None:
    mutual_learning = cfg.SEMI.BURN_IN_ITERS < cfg.SOLVER.MAX_ITER
    if mutual_learning and not (unlabeled and cfg.SOLVER.IMS_PER_BATCH_UNLABELED):
        raise UsageError(
            "there are no unlabeled images to learn from: set DATASETS.UNLABELED, or use a part of "
            "the labels with DATASETS.LABELED_PERCENT, and SOLVER.IMS_PER_BATCH_UNLABELED above 0. "
            "Or train on labels only with SEMI.BURN_IN_ITERS >= SOLVER.MAX_ITER"
        )


def _fingerprint(records: Sequence[dict]) -> str:
    if isinstance(records, ShardedImages):
        return f"{len(records)} images ({records.digest[:12]})"
    files = ImageFiles.of_records(records)
    digest = hashlib.sha256(files.base_names).hexdigest()
    return f"{len(files)} images ({digest[:12]})"
