"""Report on the data and settings of a training run, for ``tools/check_data.py``."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.config import CfgNode
from tabulate import tabulate

from ..command_line import count_of
from ..config_checks import check_supported
from ..config_scaling import scale_to_world_size
from ..data.datasets.file_names import printable_name
from ..data.inspection.annotations import (
    box_findings,
    boxes_of_classes,
    boxes_per_image,
    class_findings,
    image_findings,
)
from ..data.inspection.duplicates import copy_findings, same_file_findings
from ..data.inspection.findings import DataSets, Finding, Severity, read_data_sets
from ..data.inspection.images import ImageFacts, survey
from ..data.inspection.plausibility import plausibility_findings
from ..data.training_sets import TrainingSets
from ..errors import UsageError
from .memory_estimate import GIB, estimate_memory
from .startup_checks import (
    config_findings,
    read_for_training,
    schedule_findings,
    unreadable_findings,
    untrained_random_layers,
)

_MAX_FILES = 3  # printed for each finding


@dataclass(frozen=True)
class DataReport:
    """Everything that the check found.

    Attributes:
        overview: table of the data sets.
        findings: most severe first.
        options: ``KEY VALUE`` pairs of the user, with the fixes of all findings.
        training_values: batch, learning rate, epochs and memory; empty if training would not start.
        cfg: the config with the fixes.
        sets: the data sets as training will use them; None if they have errors.
    """

    overview: str
    findings: list[Finding]
    options: list[str]
    training_values: str
    cfg: CfgNode
    sets: TrainingSets | None

    @property
    def has_errors(self) -> bool:
        return any(finding.severity is Severity.ERROR for finding in self.findings)

    @property
    def has_errors_without_fix(self) -> bool:
        return any(f.severity is Severity.ERROR and not f.fixes for f in self.findings)

    @property
    def has_fixes(self) -> bool:
        return any(finding.fixes for finding in self.findings)

    @property
    def summary(self) -> str:
        """Number of errors and warnings."""
        counts = Counter(finding.severity for finding in self.findings)
        return ", ".join(
            count_of(counts[severity], severity.value)
            for severity in (Severity.ERROR, Severity.WARNING)
        )


def check_data(
    load: Callable[[list[str]], CfgNode], options: Sequence[str], num_gpus: int
) -> DataReport:
    """Check all data sets and settings of a training run.

    Args:
        load: creates the config from ``KEY VALUE`` pairs.
        options: the pairs of the user.
        num_gpus: number of GPUs that training will use.

    Raises:
        UsageError: if the config cannot be read, or has keys that have no effect.
    """
    cfg = load(list(options))
    check_supported(cfg)
    sets, findings = read_data_sets(cfg)
    files = [r["file_name"] for n in sets.all.values() for group in n.values() for r in group]
    facts = survey(files)
    findings += class_findings(cfg, sets) + box_findings(cfg, sets) + image_findings(sets, facts)
    can_be_fixed = all(f.fixes for f in findings if f.severity is Severity.ERROR)
    findings += plausibility_findings(cfg, sets)
    findings += same_file_findings(cfg, sets) + copy_findings(sets, facts)
    findings += _device_findings(cfg, num_gpus) + _random_weight_findings(cfg)
    fixed_options = _apply_fixes(options, findings)
    fixed = load(fixed_options)
    findings += schedule_findings(fixed) + config_findings(fixed, num_gpus)
    training = None
    # Otherwise training would only repeat the errors above. Class names are registered only once.
    if can_be_fixed and fixed.DATASETS.CLASS_NAMES == cfg.DATASETS.CLASS_NAMES:
        training, errors = read_for_training(fixed)
        findings += errors
    if training:
        findings += unreadable_findings(fixed, training, facts)
    training_values = ""
    with suppress(UsageError):  # is one of the findings
        training_values = _training_values(fixed, training, facts, num_gpus)
    return DataReport(
        overview=_overview(sets, facts),
        findings=sorted(findings, key=lambda each: list(Severity).index(each.severity)),
        options=fixed_options,
        training_values=training_values,
        cfg=fixed,
        sets=training,
    )


def format_finding(finding: Finding) -> str:
    """The finding, its first files and its fix, on a line each."""
    lines = [f"{finding.severity.value}: {finding.text}"]
    if finding.files:
        more = len(finding.files) - _MAX_FILES
        rest = f", and {more} more" if more > 0 else ""
        names = ", ".join(map(printable_name, finding.files[:_MAX_FILES]))
        lines.append(f"    {names}{rest}")
    if finding.fixes:
        fix = " ".join(shlex.join(pair) for pair in finding.fixes.items())
        lines.append(f"    fix: {fix} (included below)")
    return "\n".join(lines)


def format_all_files(findings: Sequence[Finding]) -> str:
    """All findings with all their files, one per line."""
    return "".join(
        f"{f.severity.value}: {f.text}\n" + "".join(f"\t{x}\n" for x in f.files) for f in findings
    )


def _apply_fixes(options: Sequence[str], findings: list[Finding]) -> list[str]:
    """Add the fixes to ``KEY VALUE`` pairs; the first fix of a key counts."""
    fixes: dict[str, str] = {}
    for finding in findings:
        fixes = finding.fixes | fixes
    pairs = dict(zip(options[::2], options[1::2], strict=True)) | fixes
    return [part for pair in pairs.items() for part in pair]


def _overview(sets: DataSets, facts: dict[str, ImageFacts]) -> str:
    rows, lines = [], []
    for purpose, named in sets.all.items():
        for name, records in named.items():
            sizes = [f.size for r in records if not (f := facts[r["file_name"]]).fault]
            annotated = any("annotations" in record for record in records)
            boxes = boxes_of_classes(name, records) if annotated else Counter[str]()
            rows.append(
                {
                    "used as": purpose,
                    "data set": name,
                    "images": len(records),
                    "width, pixels": _range([width for width, _ in sizes]),
                    "height, pixels": _range([height for _, height in sizes]),
                    "boxes": sum(boxes.values()) if boxes else "",
                    "boxes per image": boxes_per_image(records) if boxes and records else "",
                }
            )
            if boxes and purpose != "unlabeled":
                counts = ", ".join(f"{name} {count}" for name, count in boxes.most_common())
                lines.append(f"boxes of {name}: {counts}")
    if not rows:  # no data set could be read
        return ""
    table = tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
    return "\n".join([table, "ranges: minimum / median / maximum", *lines, ""])


def _range(values: list[int]) -> str:
    return f"{min(values)} / {np.median(values):g} / {max(values)}" if values else ""


def _device_findings(cfg: CfgNode, num_gpus: int) -> list[Finding]:
    """Check that this machine has the GPUs that training will use."""
    if not cfg.MODEL.DEVICE.startswith("cuda"):
        return []
    available = torch.cuda.device_count()
    if not available:
        fixes = {"MODEL.DEVICE": "cpu", "SOLVER.AMP.ENABLED": "False"}
        text = "this machine has no GPU; on a CPU only small detectors train in reasonable time"
        return [Finding(Severity.WARNING, text, fixes=fixes)]
    if available < num_gpus:
        text = (
            f"--num-gpus is {num_gpus}, but this machine has {count_of(available, 'GPU')}; with "
            f"--num-gpus {available} batch size, learning rate and iterations are scaled "
            "accordingly"
        )
        return [Finding(Severity.WARNING, text)]
    return []


def _random_weight_findings(cfg: CfgNode) -> list[Finding]:
    fixes = untrained_random_layers(cfg)
    text = (
        "MODEL.WEIGHTS is empty, and a part of the backbone keeps its random weights because it is "
        "frozen"
    )
    return [Finding(Severity.WARNING, text, fixes=fixes)] if fixes else []


def _training_values(
    cfg: CfgNode, sets: TrainingSets | None, facts: dict[str, ImageFacts], num_gpus: int
) -> str:
    """Batch, learning rate, iterations, epochs and memory with this number of GPUs."""
    cfg = scale_to_world_size(cfg, num_gpus)
    solver, burn_in = cfg.SOLVER, min(cfg.SEMI.BURN_IN_ITERS, cfg.SOLVER.MAX_ITER)
    labeled, unlabeled = (len(sets.labeled), len(sets.unlabeled)) if sets else (0, 0)
    lines = [
        f"on {num_gpus} process(es): {solver.IMS_PER_BATCH} labeled + "
        f"{solver.IMS_PER_BATCH_UNLABELED} unlabeled images per iteration, learning rate "
        f"{solver.BASE_LR:g}, {solver.MAX_ITER} iterations of which {burn_in} burn-in"
    ]
    if labeled:
        epochs = solver.MAX_ITER * solver.IMS_PER_BATCH / labeled
        lines.append(f"{count_of(labeled, 'labeled image')}: {epochs:.1f} epochs")
    if unlabeled:
        drawn = (solver.MAX_ITER - burn_in) * solver.IMS_PER_BATCH_UNLABELED
        lines.append(f"{count_of(unlabeled, 'unlabeled image')}: {drawn / unlabeled:.1f} epochs")
    sizes = [image.size for image in facts.values() if not image.fault]
    if sizes:
        memory = estimate_memory(cfg, sizes, num_gpus)
        lines.append(
            f"memory: about {memory.peak / GIB:.1f} GiB per process, and 1 GiB more on a GPU: "
            f"{count_of(memory.images, 'image')} of at most {memory.per_image / 2**20:.0f} MiB, "
            f"models {memory.models / 2**20:.0f} MiB, and half of that for temporary tensors. The "
            "estimate can be off by a third"
        )
    return "\n".join(lines)
