"""Findings about images that occur more than once: the same file, content or appearance."""

from __future__ import annotations

from itertools import chain

from detectron2.config import CfgNode

from ..checks import common_images
from ..datasets.packed_records import ImageFiles
from ..datasets.real_paths import RealPathCache
from .findings import DataSets, Finding, Severity
from .images import Copy, ImageFacts, copies_between, copies_within


def same_file_findings(cfg: CfgNode, sets: DataSets) -> list[Finding]:
    """Find files that several data sets contain, also through symbolic links."""
    real_paths = RealPathCache()
    leave_out = {"DATASETS.EXCLUDE_LABELED": "True"}
    leak = "; test scores would be meaningless: remove them from one of the two"
    findings = []
    for purpose, of, why, fixes in (
        ("unlabeled", "labeled", "", leave_out),
        ("unlabeled", "test", "", leave_out),
        ("labeled", "test", leak, {}),
    ):
        if fixes and cfg.DATASETS.EXCLUDE_LABELED:
            continue
        images = ImageFiles.of_records(chain(*sets.all[purpose].values()))
        common = common_images(chain(*sets.all[of].values()), images, real_paths)
        if common:
            text = f"{len(common)} {purpose} images are the same files as {of} images{why}"
            files = [images[i]["file_name"] for i in common]
            findings.append(Finding(Severity.ERROR, text, files, fixes))
    for purpose, named in sets.all.items():
        findings += _repeated_entries(purpose, named, real_paths)
    return findings


def copy_findings(sets: DataSets, facts: dict[str, ImageFacts]) -> list[Finding]:
    """Find images that are copies of images in the same or another data set."""
    images = {
        purpose: [facts[file] for file in _unique_files(named)]
        for purpose, named in sets.all.items()
    }
    findings = []
    for purpose, of, severity, why in (
        ("labeled", "test", Severity.ERROR, "test scores would be meaningless: remove them"),
        ("unlabeled", "test", Severity.ERROR, "test scores would be optimistic: remove them"),
        ("unlabeled", "labeled", Severity.WARNING, "training would use them twice"),
    ):
        copies = copies_between(images[of], images[purpose])
        findings += _describe_copies(
            copies, f"{purpose} images are also {of} images", severity, why
        )
    for purpose, group in images.items():
        why = "training and evaluation count each copy"
        text = f"{purpose} images occur more than once"
        findings += _describe_copies(copies_within(group), text, Severity.WARNING, why)
    return findings


def _repeated_entries(
    purpose: str, named: dict[str, list[dict]], real_paths: RealPathCache
) -> list[Finding]:
    """Find files that several entries of the data sets refer to."""
    known: set[str] = set()
    repeated = []
    for file in _files(named):
        real = real_paths(file)
        if real in known:
            repeated.append(file)
        known.add(real)
    if not repeated:
        return []
    consequence = (
        "training uses each file once"
        if purpose == "unlabeled"
        else "training and evaluation count each entry"
    )
    text = (
        f"{len(repeated)} entries of the {purpose} images refer to a file that another entry has; "
        + consequence
    )
    return [Finding(Severity.WARNING, text, repeated)]


def _describe_copies(copies: list[Copy], what: str, severity: Severity, why: str) -> list[Finding]:
    findings = []
    for exact, how in ((True, "the same file content"), (False, "they look the same")):
        matching = [copy for copy in copies if copy.exact == exact]
        # Images that look the same can still be different.
        level = severity if exact else Severity.WARNING
        if matching:
            text = f"{len(matching)} {what} ({how}); {why}"
            files = [f"{copy.file} = {copy.of}" for copy in matching]
            findings.append(Finding(level, text, files))
    return findings


def _unique_files(named: dict[str, list[dict]]) -> list[str]:
    """The first path of each file."""
    real_paths = RealPathCache()
    first: dict[str, str] = {}
    for file in _files(named):
        first.setdefault(real_paths(file), file)
    return list(first.values())


def _files(named: dict[str, list[dict]]) -> list[str]:
    return [record["file_name"] for record in chain(*named.values())]
