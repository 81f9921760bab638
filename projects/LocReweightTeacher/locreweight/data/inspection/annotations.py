"""What is right and wrong with the data of a config, in words, and with which keys to mend it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from ...errors import UsageError
from ..checks import check_boxes, check_classes
from .findings import DataSets, Finding, Severity
from .images import ImageFacts


def class_findings(cfg: CfgNode, sets: DataSets) -> list[Finding]:
    """Class names that do not match, and classes without a box."""
    names = {
        name: list(MetadataCatalog.get(name).get("thing_classes", []))
        for name in (*sets.train, *sets.test)
    }
    findings = [
        Finding(Severity.ERROR, f"{name} has no annotations; it can only be unlabeled")
        for name, classes in names.items()
        if not classes
    ]
    known = {name: classes for name, classes in names.items() if classes}
    if not known:
        return findings
    count = len(next(iter(known.values())))
    if count != cfg.MODEL.ROI_HEADS.NUM_CLASSES:
        findings.append(
            Finding(
                Severity.ERROR,
                f"the labeled data have {count} classes, MODEL.ROI_HEADS.NUM_CLASSES is "
                f"{cfg.MODEL.ROI_HEADS.NUM_CLASSES}",
                fixes={"MODEL.ROI_HEADS.NUM_CLASSES": str(count)},
            )
        )
    try:
        check_classes(known, count)
    except UsageError as error:
        findings.append(Finding(Severity.ERROR, str(error)))
    for name, records in (sets.train | sets.test).items():
        boxes = boxes_of_classes(name, records)
        if missing := [c for c in names[name] if not boxes[c]]:
            text = f"{name} has no box of the classes {', '.join(missing)}"
            findings.append(Finding(Severity.WARNING, text))
    return findings


def boxes_of_classes(name: str, records: list[dict]) -> Counter[str]:
    """How many boxes each class has."""
    classes = MetadataCatalog.get(name).get("thing_classes", [])
    return Counter(
        classes[annotation["category_id"]]
        for record in records
        for annotation in record.get("annotations", [])
        if annotation.get("iscrowd", 0) == 0
    )


def box_findings(cfg: CfgNode, sets: DataSets) -> list[Finding]:
    """Boxes that cannot be trained on, or of which nothing is left."""
    findings = []
    for name, records in (sets.train | sets.test).items():
        if not any("annotations" in record for record in records):
            continue
        fixes = {"DATASETS.CHECKS.DROP_BAD_BOXES": "True"} if name in sets.train else {}
        told = ""  # what the error says need not be a warning as well
        with kept_warnings():
            try:
                check_boxes(records, drop_bad=cfg.DATASETS.CHECKS.DROP_BAD_BOXES)
            except UsageError as error:
                told = "malformed"
                findings.append(Finding(Severity.ERROR, f"{name}: {error}", fixes=fixes))
        with kept_warnings() as messages:
            usable = check_boxes(records, drop_bad=True)
        findings += [
            Finding(Severity.WARNING, f"{name}: training would have {message}")
            for message in messages
            if not (told and told in message)
        ]
        if not any(a.get("iscrowd", 0) == 0 for r in usable for a in r["annotations"]):
            findings.append(Finding(Severity.ERROR, f"{name}: no box would be used"))
    return findings


def image_findings(sets: DataSets, facts: dict[str, ImageFacts]) -> list[Finding]:
    """Images that cannot be read, are rotated, or are not what their annotation says."""
    findings = []
    for purpose, named in sets.all.items():
        for name, records in named.items():
            # Training skips unlabeled images that it cannot read.
            severity = Severity.WARNING if purpose == "unlabeled" else Severity.ERROR
            faulty = [r["file_name"] for r in records if facts[r["file_name"]].fault]
            if faulty:
                reason = facts[faulty[0]].fault
                text = f"{name}: {len(faulty)} images cannot be read ({reason})"
                findings.append(Finding(severity, text, faulty))
            rotated = [r["file_name"] for r in records if facts[r["file_name"]].rotated]
            if rotated:
                text = (
                    f"{name}: {len(rotated)} images are turned by their EXIF, here as in training; "
                    "annotations must be of the upright image"
                )
                findings.append(Finding(Severity.NOTE, text, rotated))
            other = [r["file_name"] for r in records if _has_other_size(r, facts[r["file_name"]])]
            if other:
                text = (
                    f"{name}: {len(other)} images do not have the width and height that their "
                    "annotations say (after the rotation that their EXIF asks for)"
                )
                findings.append(Finding(Severity.ERROR, text, other))
    return findings


def _has_other_size(record: dict, facts: ImageFacts) -> bool:
    said = record.get("width"), record.get("height")
    return not facts.fault and None not in said and said != facts.size


@contextmanager
def kept_warnings() -> Iterator[list[str]]:
    """What reading and checking data warns of, kept out of the log."""
    logger = logging.getLogger("locreweight.data")
    messages: list[str] = []

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    keeper, propagates = Keeper(), logger.propagate
    logger.addHandler(keeper)
    logger.propagate = False
    try:
        yield messages
    finally:
        logger.removeHandler(keeper)
        logger.propagate = propagates


def boxes_per_image(records: list[dict]) -> str:
    """Least, median and most, in words."""
    counts = [len(record.get("annotations", [])) for record in records]
    without = counts.count(0)
    empty = f", {without} images without a box" if without else ""
    return f"{min(counts)} / {np.median(counts):g} / {max(counts)}{empty}"
