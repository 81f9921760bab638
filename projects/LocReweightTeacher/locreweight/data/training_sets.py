"""The labeled and the unlabeled images of a run, read and checked."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.build import (
    filter_images_with_only_crowd_annotations,
    print_instances_class_histogram,
)
from detectron2.utils import comm

from ..errors import UsageError
from .checks import (
    RealPaths,
    check_boxes,
    check_classes,
    check_images_decode,
    check_images_exist,
    check_test_set,
    common_images,
    without_overlap,
)
from .datasets.catalog import register
from .datasets.image_folders import ImageFiles
from .datasets.packed_records import PackedRecords
from .datasets.splits import split_annotated
from .monitored import choose_monitored

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingSets:
    """Records in Detectron2's standard format; the unlabeled ones have no annotations.

    Both are packed, for loader workers to share. ``monitored`` are a few of the unlabeled ones, with
    annotations where they are known: for looking and measuring, never for training.
    """

    labeled: PackedRecords
    unlabeled: ImageFiles
    class_names: list[str]
    monitored: list[dict] = field(default_factory=list)

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """Of each stream: how many images, and which in which order.

        Files count by their names without folders: data may be moved to another place.
        """
        return {"labeled": _fingerprint(self.labeled), "unlabeled": _fingerprint(self.unlabeled)}

    def check_same(self, fingerprint: dict[str, str], allow_changed: bool) -> None:
        """These are the images that a run was trained on before it is resumed.

        Args:
            fingerprint: of the run until now; nothing for one that did not note it.
            allow_changed: warn, and do not raise.

        Raises:
            UsageError: if they are not; which image is at which place in the streams follows from
                the number and the order of them.
        """
        changed = [
            f"the {stream} ones were {before}, now {self.fingerprint[stream]}"
            for stream, before in fingerprint.items()
            if self.fingerprint[stream] != before
        ]
        if not changed:
            return
        problem = f"the training images are not those of this run until now: {'; '.join(changed)}"
        if not allow_changed:
            raise UsageError(
                f"{problem}. Put the data back as it was, go on with what there is by "
                "DATASETS.CHECKS.ALLOW_CHANGED True, or start anew in another OUTPUT_DIR"
            )
        logger.warning("%s", problem)


def register_datasets(cfg: CfgNode, *, training: bool = True) -> None:
    """Make the data sets of the config known to Detectron2.

    Args:
        cfg: names them.
        training: those to train on as well; a model can be evaluated where they are not at hand.

    Raises:
        UsageError: for an unknown name, a missing file or folder.
    """
    data = cfg.DATASETS
    register_named = partial(register, allow_outside=data.CHECKS.ALLOW_OUTSIDE_PATHS)
    labeled = [*data.TEST, *data.TRAIN, *data.UNLABELED_TRUTH] if training else data.TEST
    register_named(labeled, data.CLASS_NAMES)
    if training:
        register_named(data.UNLABELED, data.CLASS_NAMES, labeled=False)


def load_training_sets(cfg: CfgNode) -> TrainingSets:
    """Read, check and split ``DATASETS.TRAIN`` and ``DATASETS.UNLABELED``.

    Raises:
        UsageError: for anything in them that the user has to put right.
    """
    if not cfg.DATASETS.TRAIN:
        raise UsageError("DATASETS.TRAIN is empty: training needs at least one labeled image")
    annotated = {name: list(_load(name)) for name in cfg.DATASETS.TRAIN}
    tested = {name: list(_load(name)) for name in cfg.DATASETS.TEST}
    for name, records in tested.items():
        check_test_set(name, records)
        check_images_exist(records)
    class_names = _checked_class_names(cfg)
    drawn, rest = split_annotated(cfg, annotated)
    labeled = check_boxes(drawn, drop_bad=cfg.DATASETS.CHECKS.DROP_BAD_BOXES)
    check_images_exist(labeled)
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        labeled = filter_images_with_only_crowd_annotations(labeled)
    # Whether images without one were left out or not: a detector of nothing is not meant.
    if not any(a.get("iscrowd", 0) == 0 for record in labeled for a in record["annotations"]):
        raise UsageError(
            f"no labeled image of {', '.join(cfg.DATASETS.TRAIN)} has a box to train on: its "
            "annotations are missing or left out, or DATASETS.LABELED_PERCENT drew none of them"
        )
    others = {name: _load(name) for name in cfg.DATASETS.UNLABELED}
    found = ImageFiles.joined([*map(ImageFiles.of_records, (rest, *others.values()))])
    real_paths = RealPaths()
    exclude = cfg.DATASETS.EXCLUDE_LABELED
    unlabeled = without_overlap(labeled, found, real_paths, exclude=exclude)
    unlabeled = _without_test_images(cfg, unlabeled, tested, real_paths)
    _warn_of_labeled_test_images(labeled, tested, real_paths)
    _check_enough_unlabeled(cfg, unlabeled)
    monitored = choose_monitored(cfg, unlabeled, rest, others, class_names)
    if cfg.DATASETS.CHECKS.DECODE_IMAGES:
        # Last, since it takes longest. Boxes that were left out may be due to a wrong size.
        check_images_decode([*drawn, *(record for name in tested for record in tested[name])])
    if comm.is_main_process():
        boxes = [annotation for record in labeled for annotation in record["annotations"]]
        # As if of one image, which is counted faster.
        print_instances_class_histogram([{"annotations": boxes}], class_names)
        logger.info("%d labeled and %d unlabeled images", len(labeled), len(unlabeled))
    return TrainingSets(PackedRecords(labeled), unlabeled, class_names, monitored)


def _fingerprint(records: ImageFiles | Iterable[dict]) -> str:
    files = ImageFiles.of_records(records)
    digest = hashlib.sha256(files.base_names).hexdigest()
    return f"{len(files)} images ({digest[:12]})"


def _load(name: str) -> Sequence[dict]:
    records = DatasetCatalog.get(name)
    if not records:
        raise UsageError(f"the data set {name} has no images")
    return records


def _checked_class_names(cfg: CfgNode) -> list[str]:
    names = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    class_names = {n: list(MetadataCatalog.get(n).get("thing_classes", [])) for n in names}
    for name, classes in class_names.items():
        if not classes:
            raise UsageError(f"{name} has no annotations; name it in DATASETS.UNLABELED")
    check_classes(class_names, cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    return class_names[cfg.DATASETS.TRAIN[0]]


def _without_test_images(
    cfg: CfgNode, unlabeled: ImageFiles, tested: dict[str, list[dict]], real_paths: RealPaths
) -> ImageFiles:
    common = common_images(chain(*tested.values()), unlabeled, real_paths)
    if not common:
        return unlabeled
    if cfg.DATASETS.EXCLUDE_LABELED:
        logger.info("left out %d unlabeled images that are test images", len(common))
        return unlabeled.without(common)
    logger.warning(
        "%d unlabeled images are in the test sets %s as well: the result will flatter. Leave them "
        "out with DATASETS.EXCLUDE_LABELED True",
        len(common),
        ", ".join(tested),
    )
    return unlabeled


def _warn_of_labeled_test_images(
    labeled: list[dict], tested: dict[str, list[dict]], real_paths: RealPaths
) -> None:
    """No error: to train and test on the same few images is how one sees that training works."""
    images = ImageFiles.of_records(labeled)
    common = common_images(chain(*tested.values()), images, real_paths)
    if common:
        logger.warning(
            "%d of %d labeled images are in the test sets %s as well: how good the detector is on "
            "images that it has not learned will not be known. Take them out of DATASETS.TRAIN or "
            "DATASETS.TEST",
            len(common),
            len(labeled),
            ", ".join(tested),
        )


def _check_enough_unlabeled(cfg: CfgNode, unlabeled: ImageFiles) -> None:
    mutual_learning = cfg.SEMI.BURN_IN_ITERS < cfg.SOLVER.MAX_ITER
    if mutual_learning and not (unlabeled and cfg.SOLVER.IMS_PER_BATCH_UNLABELED):
        raise UsageError(
            "there are no unlabeled images to learn from: name some in DATASETS.UNLABELED or use "
            "less of the labels with DATASETS.LABELED_PERCENT, with SOLVER.IMS_PER_BATCH_UNLABELED "
            "above 0; or train on labels alone with SEMI.BURN_IN_ITERS >= SOLVER.MAX_ITER"
        )
