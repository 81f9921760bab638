"""Findings about data sets, and reading each data set of a config separately."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from enum import Enum

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ...errors import UsageError
from ..datasets.catalog import expand_path, with_unannotated_images
from ..datasets.shards import ShardedImages
from ..datasets.voc import split_file, used_class_names
from ..training_sets import register_datasets


class Severity(Enum):
    """Severity of a finding."""

    ERROR = "error"  # training would stop, learn something wrong, or have meaningless results
    WARNING = "warning"  # training would work, but the data should be looked at
    NOTE = "note"


@dataclass(frozen=True)
class Finding:
    """A finding about the data or the config.

    Attributes:
        severity: how serious it is.
        text: a sentence for the user.
        files: all affected files.
        fixes: config keys and values that fix it, if there are any.
    """

    severity: Severity
    text: str
    files: list[str] = field(default_factory=list)
    fixes: dict[str, str] = field(default_factory=dict)


@dataclass
class DataSets:
    """Records of the data sets of a config by name, without data sets that cannot be read."""

    train: dict[str, list[dict]] = field(default_factory=dict)
    test: dict[str, list[dict]] = field(default_factory=dict)
    unlabeled: dict[str, list[dict]] = field(default_factory=dict)

    @property
    def all(self) -> dict[str, dict[str, list[dict]]]:
        """All data sets by purpose: labeled, test and unlabeled."""
        return {"labeled": self.train, "test": self.test, "unlabeled": self.unlabeled}


def read_data_sets(cfg: CfgNode) -> tuple[DataSets, list[Finding]]:
    """Read each data set of a config separately, so that all problems are found."""
    sets, findings = DataSets(), []
    problems: dict[str, str] = {}  # data set -> why it cannot be read
    for key, target in (
        ("TRAIN", sets.train),
        ("TEST", sets.test),
        ("UNLABELED", sets.unlabeled),
    ):
        for name in cfg.DATASETS[key]:
            try:
                register_datasets(_config_with(cfg, key, name))
                records = DatasetCatalog.get(name)
                if isinstance(records, ShardedImages):
                    text = f"{name}: its {len(records)} images are not examined, nor compared"
                    findings.append(Finding(Severity.NOTE, text))
                    continue
                if key == "UNLABELED":
                    records = with_unannotated_images(name, records)
                target[name] = records
            except UsageError as error:
                problems[name] = str(error)
            else:
                if not target[name]:
                    findings.append(Finding(Severity.ERROR, f"{name} has no images"))
    findings += [_unreadable_set(cfg, sets, name, problem) for name, problem in problems.items()]
    if not cfg.DATASETS.TRAIN:
        findings.append(
            Finding(Severity.ERROR, "DATASETS.TRAIN is empty: set it to your labeled images")
        )
    if not cfg.DATASETS.TEST:
        text = "DATASETS.TEST is empty: the detector will not be evaluated"
        findings.append(Finding(Severity.WARNING, text))
    return sets, findings


def _config_with(cfg: CfgNode, key: str, name: str) -> CfgNode:
    cfg = cfg.clone()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (), ()
    cfg.DATASETS.UNLABELED, cfg.DATASETS.UNLABELED_TRUTH = (), ()
    cfg.DATASETS[key] = (name,)
    return cfg


def _unreadable_set(cfg: CfgNode, sets: DataSets, name: str, problem: str) -> Finding:
    """Explain why a data set cannot be read; unknown class names get a suggested fix."""
    used_names = _class_names_in(cfg, name)
    expected = list(cfg.DATASETS.CLASS_NAMES) or MetadataCatalog.get(name).get("thing_classes", [])
    if set(used_names) <= set(expected):
        return Finding(Severity.ERROR, problem)
    known = [c for c in used_names if c in expected]
    consequence = "training would stop at the others" if known else "no box would be used"
    suggestion, problem = _suggest_class_names(cfg, sets)
    # Double quotes, because the shell command puts single quotes around the value.
    names = "(" + "".join(f'"{c}",' for c in suggestion) + ")"
    fixes = {
        "DATASETS.CLASS_NAMES": names,
        "MODEL.ROI_HEADS.NUM_CLASSES": str(len(suggestion)),
    }
    return Finding(
        Severity.ERROR,
        f"{name}: its annotations have the classes {', '.join(used_names)}, but "
        f"DATASETS.CLASS_NAMES are {', '.join(expected)}: {consequence}{problem}",
        fixes=fixes if suggestion else {},
    )


def _suggest_class_names(cfg: CfgNode, sets: DataSets) -> tuple[list[str], str]:
    """Class names with which all labeled and test sets could be read, or why there are none."""
    used = {
        c for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST) for c in _class_names_in(cfg, name)
    }
    names = sorted(used)
    similar = [c for c in names if sum(c.casefold() == other.casefold() for other in names) > 1]
    if similar:
        names_text = ", ".join(similar)
        return [], f". {names_text} differ only in case: use the same case in all annotations"
    for name in (*sets.train, *sets.test):
        fixed_names = list(MetadataCatalog.get(name).get("thing_classes", []))
        if name.startswith("voc:") or not fixed_names:
            continue
        # Other formats define their class names and order, which the model must share.
        if used <= set(fixed_names):
            return fixed_names, ""
        return [], f". {name} has the classes {', '.join(fixed_names)}: use the same ones"
    return names, ""


def _class_names_in(cfg: CfgNode, name: str) -> list[str]:
    """Class names in the annotations of a ``voc:`` data set; empty for other formats."""
    kind, _, location = name.partition(":")
    folder, _, split = expand_path(location).rpartition(":")
    if kind != "voc" or not os.path.isfile(split_file(folder, split)):
        return []
    try:
        allow_outside = cfg.DATASETS.CHECKS.ALLOW_OUTSIDE_PATHS
        return used_class_names(folder, split, allow_outside=allow_outside)
    except UsageError:  # reported by another finding
        return []
