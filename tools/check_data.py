#!/usr/bin/env python
"""Look at the data and the settings of a training before it is started.

    python tools/check_data.py --config-file configs/quickstart.yaml
    python tools/check_data.py --num-gpus 2 --config-file configs/Base-LocReweight.yaml \\
        DATASETS.TRAIN "('coco:data/train.json:data/train',)" \\
        DATASETS.UNLABELED "('folder:data/unlabeled',)" \\
        DATASETS.TEST "('coco:data/val.json:data/val',)"

Takes the words of train_net.py. Every image is read once; what is wrong is told with its way out,
what training itself would refuse included (weights of a zoo are fetched for that), and at the end
stands the command to train with, mended where a config key mends it. The exit code is 1 if there is
an error. --list writes all findings with all their files. Copies that were mirrored or cropped are
not found.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from tabulate import tabulate

from locreweight.config import check_supported, load_config, scale_to_world_size
from locreweight.data.inspection.annotations import (
    box_findings,
    boxes_of_classes,
    boxes_per_image,
    class_findings,
    image_findings,
)
from locreweight.data.inspection.duplicates import copy_findings, same_file_findings
from locreweight.data.inspection.findings import DataSets, Finding, Severity, read_data_sets
from locreweight.data.inspection.images import ImageFacts, survey
from locreweight.data.training_sets import TrainingSets
from locreweight.engine.memory_estimate import GIB, estimate_memory
from locreweight.engine.startup_checks import (
    config_findings,
    read_for_training,
    unreadable_findings,
    untrained_random_layers,
)
from locreweight.errors import UsageError

_SHOWN = 3  # of many files, how many are printed


def check(args: argparse.Namespace) -> list[Finding]:
    """Print the report; returns the findings.

    Raises:
        UsageError: if the config itself cannot be read, or has keys that nothing here reads.
    """
    cfg = load_config(args.config_file, args.opts, args.method)
    check_supported(cfg)
    sets, findings = read_data_sets(cfg)
    files = [r["file_name"] for n in sets.all.values() for group in n.values() for r in group]
    facts = survey(files)
    print(overview(sets, facts))
    findings += class_findings(cfg, sets) + box_findings(cfg, sets) + image_findings(sets, facts)
    can_be_mended = all(f.fixes for f in findings if f.severity is Severity.ERROR)
    findings += same_file_findings(cfg, sets) + copy_findings(sets, facts)
    findings += device_findings(cfg, args.num_gpus) + random_findings(cfg)
    words = with_fixes(args.opts, findings)
    mended = load_config(args.config_file, words, args.method)
    findings += config_findings(mended, args.num_gpus)
    training = None
    # Else training would stop at what is told already; and class names are registered only once.
    if can_be_mended and mended.DATASETS.CLASS_NAMES == cfg.DATASETS.CLASS_NAMES:
        training, refusals = read_for_training(mended)
        findings += refusals
    if training:
        findings += unreadable_findings(mended, training, facts)
    for finding in sorted(findings, key=lambda each: list(Severity).index(each.severity)):
        print_finding(finding)
    with suppress(UsageError):  # which is one of the findings
        print(f"\n{effective_values(mended, training, facts, args.num_gpus)}")
    print(f"\nto train:\n  {training_command(args, words)}")
    return findings


def with_fixes(options: list[str], findings: list[Finding]) -> list[str]:
    """``KEY VALUE`` pairs with what mends the findings; of two ways to mend a key the first."""
    fixes: dict[str, str] = {}
    for finding in findings:
        fixes = finding.fixes | fixes
    pairs = dict(zip(options[::2], options[1::2], strict=True)) | fixes
    return [part for pair in pairs.items() for part in pair]


def overview(sets: DataSets, facts: dict[str, ImageFacts]) -> str:
    """A table of the data sets, and the boxes of their classes."""
    rows, lines = [], []
    for purpose, named in sets.all.items():
        for name, records in named.items():
            sizes = [f.size for r in records if not (f := facts[r["file_name"]]).fault]
            annotated = any("annotations" in record for record in records)
            boxes = boxes_of_classes(name, records) if annotated else Counter[str]()
            rows.append(
                {
                    "for": purpose,
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
    table = tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
    note = "ranges are least / median / most"
    return "\n".join([table, note, *lines, ""])


def device_findings(cfg: CfgNode, num_gpus: int) -> list[Finding]:
    """Whether as many devices are there as training is to use."""
    if not cfg.MODEL.DEVICE.startswith("cuda"):
        return []
    there = torch.cuda.device_count()
    if not there:
        fixes = {"MODEL.DEVICE": "cpu", "SOLVER.AMP.ENABLED": "False"}
        text = "there is no GPU here; without one only small detectors can be trained in good time"
        return [Finding(Severity.WARNING, text, fixes=fixes)]
    if there < num_gpus:
        text = (
            f"{num_gpus} GPUs are asked for and {there} are here; with --num-gpus {there} batch, "
            "learning rate and iterations follow"
        )
        return [Finding(Severity.WARNING, text)]
    return []


def random_findings(cfg: CfgNode) -> list[Finding]:
    """Whether a backbone that starts at random would in part stay so."""
    fixes = untrained_random_layers(cfg)
    text = "MODEL.WEIGHTS is empty, and part of the backbone stays at random for good"
    return [Finding(Severity.WARNING, text, fixes=fixes)] if fixes else []


def effective_values(
    cfg: CfgNode, sets: TrainingSets | None, facts: dict[str, ImageFacts], num_gpus: int
) -> str:
    """Batch, learning rate, iterations, epochs and memory on this number of GPUs.

    Raises:
        UsageError: for settings that training would stop at as well.
    """
    cfg = scale_to_world_size(cfg, num_gpus)
    solver, burn_in = cfg.SOLVER, min(cfg.SEMI.BURN_IN_ITERS, cfg.SOLVER.MAX_ITER)
    labeled, unlabeled = (len(sets.labeled), len(sets.unlabeled)) if sets else (0, 0)
    lines = [
        f"on {num_gpus} process(es): {solver.IMS_PER_BATCH} labeled + "
        f"{solver.IMS_PER_BATCH_UNLABELED} unlabeled images an iteration, learning rate "
        f"{solver.BASE_LR:g}, {solver.MAX_ITER} iterations of which {burn_in} burn-in"
    ]
    if labeled:
        epochs = solver.MAX_ITER * solver.IMS_PER_BATCH / labeled
        lines.append(f"{labeled} labeled images: {epochs:.1f} epochs")
    if unlabeled:
        seen = (solver.MAX_ITER - burn_in) * solver.IMS_PER_BATCH_UNLABELED
        lines.append(f"{unlabeled} unlabeled images: {seen / unlabeled:.1f} epochs")
    sizes = [found.size for found in facts.values() if not found.fault]
    if sizes:
        memory = estimate_memory(cfg, sizes, num_gpus)
        lines.append(
            f"memory: about {memory.peak / GIB:.1f} GiB for each process, on a GPU 1 GiB more: "
            f"{memory.images} images of at most {memory.per_image / 2**20:.0f} MiB, models "
            f"{memory.models / 2**20:.0f} MiB, and more than half as much again in passing. An "
            "estimate that can be off by a third"
        )
    return "\n".join(lines)


def training_command(args: argparse.Namespace, options: list[str]) -> str:
    """For a shell."""
    files = ["--config-file", args.config_file] if args.config_file else []
    files += ["--method", args.method] if args.method else []
    words = ["python", "train_net.py", "--num-gpus", str(args.num_gpus), *files, *options]
    return shlex.join(words)


def print_finding(finding: Finding) -> None:
    """A line or two."""
    print(f"{finding.severity.value}: {finding.text}")
    if finding.files:
        more = len(finding.files) - _SHOWN
        rest = f", and {more} more" if more > 0 else ""
        print(f"    {', '.join(finding.files[:_SHOWN])}{rest}")
    if finding.fixes:
        mends = " ".join(shlex.join(pair) for pair in finding.fixes.items())
        print(f"    mended by {mends}, which is in the command below")


def summary(findings: list[Finding]) -> str:
    """How many there are."""
    counts = Counter(finding.severity for finding in findings)
    lines = f"\n{counts[Severity.ERROR]} errors, {counts[Severity.WARNING]} warnings"
    if any(finding.fixes for finding in findings):
        lines += "\nrun this again with the words of the command above to see it mended"
    return lines


def write_list(file: Path, findings: list[Finding]) -> None:
    """All findings with all their files.

    Raises:
        UsageError: if that cannot be written.
    """
    lines = [
        f"{f.severity.value}: {f.text}\n" + "".join(f"\t{x}\n" for x in f.files) for f in findings
    ]
    try:
        # Names of files are whatever the disk has.
        file.write_text("".join(lines), errors="surrogateescape")
    except OSError as error:
        raise UsageError(f"cannot write {file}: {error.strerror}") from error


def _range(values: list[int]) -> str:
    return f"{min(values)} / {np.median(values):g} / {max(values)}" if values else ""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default="", metavar="FILE")
    parser.add_argument("--method", default="", metavar="FILE")
    parser.add_argument("--num-gpus", type=int, default=1, help="that training will use")
    parser.add_argument("--list", type=Path, metavar="FILE", help="write all findings with files")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs of the config")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    logging.getLogger("detectron2").setLevel(logging.ERROR)
    try:
        findings = check(args)
        print(summary(findings))
        if args.list:
            write_list(args.list, findings)
    except UsageError as error:
        sys.exit(f"error: {error}")
    sys.exit(1 if any(finding.severity is Severity.ERROR for finding in findings) else 0)


if __name__ == "__main__":
    main()
