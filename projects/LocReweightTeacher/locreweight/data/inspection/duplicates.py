"""Images that are in the data of a config more than once, by their files, contents or looks."""

from __future__ import annotations

from itertools import chain

from detectron2.config import CfgNode

from ..checks import common_images
from ..datasets.packed_records import ImageFiles
from ..datasets.real_paths import RealPathCache
from .findings import DataSets, Finding, Severity
from .images import Copy, ImageFacts, copies_between, copies_within


def same_file_findings(cfg: CfgNode, sets: DataSets) -> list[Finding]:
    """The very same files in two places, whatever links lead to them."""
    real_paths = RealPathCache()
    leave_out = {"DATASETS.EXCLUDE_LABELED": "True"}
    nothing = "; the result would mean nothing: take them out of one of the two"
    findings = []
    for purpose, of, why, fixes in (
        ("unlabeled", "labeled", "", leave_out),
        ("unlabeled", "test", "", leave_out),
        ("labeled", "test", nothing, {}),
    ):
        if fixes and cfg.DATASETS.EXCLUDE_LABELED:
            continue
        images = ImageFiles.of_records(chain(*sets.all[purpose].values()))
        common = common_images(chain(*sets.all[of].values()), images, real_paths)
        if common:
            text = f"{len(common)} {purpose} images are the very files of the {of} ones{why}"
            files = [images[i]["file_name"] for i in common]
            findings.append(Finding(Severity.ERROR, text, files, fixes))
    for purpose, named in sets.all.items():
        findings += _listed_again(purpose, named, real_paths)
    return findings


def copy_findings(sets: DataSets, facts: dict[str, ImageFacts]) -> list[Finding]:
    """Images that are copies of others, test images among others above all."""
    images = {
        purpose: [facts[file] for file in _different_files(named)]
        for purpose, named in sets.all.items()
    }
    findings = []
    for purpose, of, severity, why in (
        ("labeled", "test", Severity.ERROR, "the result would mean nothing: take them out"),
        ("unlabeled", "test", Severity.ERROR, "the result would flatter: take them out"),
        ("unlabeled", "labeled", Severity.WARNING, "they would be learned twice"),
    ):
        copies = copies_between(images[of], images[purpose])
        findings += _of_copies(copies, f"{purpose} images are {of} images as well", severity, why)
    for purpose, group in images.items():
        why = "each counts as one more image"
        text = f"{purpose} images are there more than once"
        findings += _of_copies(copies_within(group), text, Severity.WARNING, why)
    return findings


def _listed_again(
    purpose: str, named: dict[str, list[dict]], real_paths: RealPathCache
) -> list[Finding]:
    """A warning of files that several entries of the data sets name."""
    seen: set[str] = set()
    again = []
    for file in _files(named):
        real = real_paths(file)
        if real in seen:
            again.append(file)
        seen.add(real)
    if not again:
        return []
    text = (
        f"{len(again)} entries of the {purpose} images name a file that another one names already; "
        "each counts as one more image"
    )
    return [Finding(Severity.WARNING, text, again)]


def _of_copies(copies: list[Copy], what: str, severity: Severity, why: str) -> list[Finding]:
    findings = []
    for exact, how in ((True, "the same file content"), (False, "they look alike")):
        found = [copy for copy in copies if copy.exact == exact]
        # Two images that look alike need not be one: somebody has to look.
        level = severity if exact else Severity.WARNING
        if found:
            text = f"{len(found)} {what} ({how}); {why}"
            files = [f"{copy.file} = {copy.of}" for copy in found]
            findings.append(Finding(level, text, files))
    return findings


def _different_files(named: dict[str, list[dict]]) -> list[str]:
    """One path of each file, the first."""
    real_paths = RealPathCache()
    first: dict[str, str] = {}
    for file in _files(named):
        first.setdefault(real_paths(file), file)
    return list(first.values())


def _files(named: dict[str, list[dict]]) -> list[str]:
    return [record["file_name"] for record in chain(*named.values())]
