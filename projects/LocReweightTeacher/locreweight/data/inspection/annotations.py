"""Findings about classes, boxes and image files."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from ...errors import UsageError
from ..checks import check_boxes, check_classes, describe_crowds, with_configured_names
from .findings import DataSets, Finding, Severity
from .images import ImageFacts


def class_findings(cfg: CfgNode, sets: DataSets) -> list[Finding]:
    """Find class names that do not match, and classes without boxes."""
    names = {
        name: list(MetadataCatalog.get(name).get("thing_classes", []))
        for name in (*sets.train, *sets.test)
    }
    findings = [
        Finding(Severity.ERROR, f"{name} has no annotations; use it in DATASETS.UNLABELED")
        for name, classes in names.items()
        if not classes
    ]
    known = {name: classes for name, classes in names.items() if classes}
    if not known:
        return findings
    count = len(next(iter(known.values())))
    try:
        check_classes(with_configured_names(cfg, known), count)
    except UsageError as error:
        findings.append(Finding(Severity.ERROR, str(error)))
    else:
        if count != cfg.MODEL.ROI_HEADS.NUM_CLASSES:
            findings.append(
                Finding(
                    Severity.ERROR,
                    f"the labeled data have {count} classes, MODEL.ROI_HEADS.NUM_CLASSES is "
                    f"{cfg.MODEL.ROI_HEADS.NUM_CLASSES}",
                    fixes={"MODEL.ROI_HEADS.NUM_CLASSES": str(count)},
                )
            )
    for name, records in (sets.train | sets.test).items():
        boxes = boxes_of_classes(name, records)
        if missing := [c for c in names[name] if not boxes[c]]:
            text = f"{name} has no box of the classes {', '.join(missing)}"
            findings.append(Finding(Severity.WARNING, text))
    return findings


def boxes_of_classes(name: str, records: list[dict]) -> Counter[str]:
    """Number of boxes of each class, without crowds."""
    classes = MetadataCatalog.get(name).get("thing_classes", [])
    return Counter(
        classes[annotation["category_id"]]
        for record in records
        for annotation in record.get("annotations", [])
        if annotation.get("iscrowd", 0) == 0
    )


def box_findings(cfg: CfgNode, sets: DataSets) -> list[Finding]:
    """Find boxes that cannot be trained on."""
    findings = []
    for name, records in (sets.train | sets.test).items():
        if not any("annotations" in record for record in records):
            continue
        purpose = "are not trained on" if name in sets.train else "are ignored in evaluation"
        if crowds := describe_crowds(name, records, f"They {purpose}"):
            findings.append(Finding(Severity.NOTE, crowds))
        fixes = {"DATASETS.CHECKS.DROP_BAD_BOXES": "True"} if name in sets.train else {}
        reported = ""  # part of the warning that would repeat the error
        with collected_warnings():
            try:
                check_boxes(records, drop_bad=cfg.DATASETS.CHECKS.DROP_BAD_BOXES)
            except UsageError as error:
                reported = "malformed"
                findings.append(Finding(Severity.ERROR, f"{name}: {error}", fixes=fixes))
        with collected_warnings() as messages:
            usable = check_boxes(records, drop_bad=True)
        findings += [
            Finding(
                Severity.WARNING,
                f"{name}: training {message.replace('left out', 'would leave out', 1)}",
            )
            for message in messages
            if not (reported and reported in message)
        ]
        if not any(a.get("iscrowd", 0) == 0 for r in usable for a in r["annotations"]):
            use = "trained on" if name in sets.train else "evaluated on"
            findings.append(Finding(Severity.ERROR, f"{name}: no box could be {use}"))
    return findings


def image_findings(sets: DataSets, facts: dict[str, ImageFacts]) -> list[Finding]:
    """Find images that cannot be read, are rotated by EXIF, or differ from their annotation."""
    findings = []
    for purpose, named in sets.all.items():
        for name, records in named.items():
            # Training skips unreadable unlabeled images.
            severity = Severity.WARNING if purpose == "unlabeled" else Severity.ERROR
            faulty = [r["file_name"] for r in records if facts[r["file_name"]].fault]
            if faulty:
                reason = facts[faulty[0]].fault
                text = f"{name}: {len(faulty)} of {len(records)} images cannot be read ({reason})"
                findings.append(Finding(severity, text, faulty))
            rotated = [r["file_name"] for r in records if facts[r["file_name"]].rotated]
            if rotated:
                text = (
                    f"{name}: {len(rotated)} of {len(records)} images are rotated by their EXIF "
                    "orientation, as in training; their annotations must refer to the upright image"
                )
                findings.append(Finding(Severity.NOTE, text, rotated))
            mismatched = [
                r["file_name"] for r in records if _has_wrong_size(r, facts[r["file_name"]])
            ]
            if mismatched:
                text = (
                    f"{name}: {len(mismatched)} of {len(records)} images have another width and "
                    "height than their annotations say (after EXIF rotation)"
                )
                findings.append(Finding(Severity.ERROR, text, mismatched))
    return findings


def _has_wrong_size(record: dict, facts: ImageFacts) -> bool:
    annotated = record.get("width"), record.get("height")
    return not facts.fault and None not in annotated and annotated != facts.size


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """Collect the warnings of :mod:`locreweight.data` instead of logging them."""
    logger = logging.getLogger("locreweight.data")
    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    collector, propagates = Collector(), logger.propagate
    logger.addHandler(collector)
    logger.propagate = False
    try:
        yield messages
    finally:
        logger.removeHandler(collector)
        logger.propagate = propagates


def boxes_per_image(records: list[dict]) -> str:
    """Minimum, median and maximum number of boxes per annotated image, for the overview."""
    counts = [len(record["annotations"]) for record in records if "annotations" in record]
    without = counts.count(0)
    text = f"{min(counts)} / {np.median(counts):g} / {max(counts)}"
    if without:
        text += f", {without} images without boxes"
    if len(counts) < len(records):
        text += f", {len(records) - len(counts)} images not annotated"
    return text
