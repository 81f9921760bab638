"""The data sets of a config, each read on its own, and what is found of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from xml.etree import ElementTree

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ...errors import UsageError
from ..datasets.catalog import expand_path
from ..training_sets import register_datasets


class Severity(Enum):
    """How bad a finding is."""

    ERROR = "error"  # training would stop, learn something wrong, or its result mean nothing
    WARNING = "warning"  # it would work; somebody should have a look
    NOTE = "note"


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        severity: of it.
        text: in a sentence.
        files: all that it is about.
        fixes: config keys and values that mend it, if any do.
    """

    severity: Severity
    text: str
    files: list[str] = field(default_factory=list)
    fixes: dict[str, str] = field(default_factory=dict)


@dataclass
class DataSets:
    """The records of a config's data sets by name; those that cannot be read are left out."""

    train: dict[str, list[dict]] = field(default_factory=dict)
    test: dict[str, list[dict]] = field(default_factory=dict)
    unlabeled: dict[str, list[dict]] = field(default_factory=dict)

    @property
    def all(self) -> dict[str, dict[str, list[dict]]]:
        """The same by what they are for, as messages call it."""
        return {"labeled": self.train, "test": self.test, "unlabeled": self.unlabeled}


def read_data_sets(cfg: CfgNode) -> tuple[DataSets, list[Finding]]:
    """Read all data sets of a config, each on its own."""
    sets, findings = DataSets(), []
    problems: dict[str, str] = {}  # name -> why it cannot be read
    for key, target in (
        ("TRAIN", sets.train),
        ("TEST", sets.test),
        ("UNLABELED", sets.unlabeled),
    ):
        for name in cfg.DATASETS[key]:
            try:
                register_datasets(_with_one(cfg, key, name))
                target[name] = DatasetCatalog.get(name)
            except UsageError as error:
                problems[name] = str(error)
            else:
                if not target[name]:
                    findings.append(Finding(Severity.ERROR, f"{name} has no images"))
    findings += [_unread(cfg, sets, name, problem) for name, problem in problems.items()]
    if not cfg.DATASETS.TRAIN:
        findings.append(
            Finding(Severity.ERROR, "DATASETS.TRAIN is empty: name your labeled images")
        )
    if not cfg.DATASETS.TEST:
        text = "DATASETS.TEST is empty: how good the detector is will not be known"
        findings.append(Finding(Severity.WARNING, text))
    return sets, findings


def _with_one(cfg: CfgNode, key: str, name: str) -> CfgNode:
    cfg = cfg.clone()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (), ()
    cfg.DATASETS.UNLABELED, cfg.DATASETS.UNLABELED_TRUTH = (), ()
    cfg.DATASETS[key] = (name,)
    return cfg


def _unread(cfg: CfgNode, sets: DataSets, name: str, problem: str) -> Finding:
    """Why a data set could not be read: by its class names, or as its reader says it."""
    found = _class_names_in(name)
    expected = list(cfg.DATASETS.CLASS_NAMES) or MetadataCatalog.get(name).get("thing_classes", [])
    if set(found) <= set(expected):
        return Finding(Severity.ERROR, problem)
    used = [c for c in found if c in expected]
    consequence = "training would stop at the others" if used else "no box would be used"
    fitting, doubt = _fitting_names(cfg, sets)
    # Double quotes inside: a shell's go around them.
    names = "(" + "".join(f'"{c}",' for c in fitting) + ")"
    fixes = {
        "DATASETS.CLASS_NAMES": names,
        "MODEL.ROI_HEADS.NUM_CLASSES": str(len(fitting)),
    }
    return Finding(
        Severity.ERROR,
        f"{name}: its annotations name the classes {', '.join(found)}; DATASETS.CLASS_NAMES are "
        f"{', '.join(expected)}: {consequence}{doubt}",
        fixes=fixes if fitting else {},
    )


def _fitting_names(cfg: CfgNode, sets: DataSets) -> tuple[list[str], str]:
    """Class names under which all labeled and test sets could be read, or why there are none."""
    used = {c for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST) for c in _class_names_in(name)}
    names = sorted(used)
    alike = [c for c in names if sum(c.casefold() == other.casefold() for other in names) > 1]
    if alike:
        return [], f". {', '.join(alike)} differ only in case: write them alike in the annotations"
    for name in (*sets.train, *sets.test):
        given = list(MetadataCatalog.get(name).get("thing_classes", []))
        if name.startswith("voc:") or not given:
            continue
        # These say their classes themselves, in their order, and the model has but one list.
        if used <= set(given):
            return given, ""
        return [], f". {name} has the classes {', '.join(given)}: make them the same"
    return names, ""


def _class_names_in(name: str) -> list[str]:
    """Of a ``voc:`` data set: the names that its annotations use."""
    kind, _, rest = name.partition(":")
    folder, _, split = expand_path(rest).rpartition(":")
    listed = Path(folder) / "ImageSets" / "Main" / f"{split}.txt"
    if kind != "voc" or not listed.is_file():
        return []
    names: set[str] = set()
    for line in filter(str.strip, listed.read_text(errors="replace").splitlines()):
        try:
            root = ElementTree.parse(Path(folder, "Annotations", f"{line.split()[0]}.xml"))
        except (OSError, ValueError, LookupError, ElementTree.ParseError):
            continue  # another finding tells of it
        names.update((node.text or "").strip() for node in root.findall("object/name"))
    return sorted(names)
