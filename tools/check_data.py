#!/usr/bin/env python
"""Check the data and settings of a training before it starts.

    python tools/check_data.py --config-file configs/quickstart.yaml
    python tools/check_data.py --num-gpus 2 --config-file configs/Base-LocReweight.yaml \\
        DATASETS.TRAIN "('coco:data/train.json:data/train',)" \\
        DATASETS.UNLABELED "('folder:data/unlabeled',)" \\
        DATASETS.TEST "('coco:data/val.json:data/val',)"

Takes --config-file, --method, --num-gpus and KEY VALUE pairs, as train_net.py does, and reads every
image once. Prints an overview, all problems with their fixes, including those that training itself
would stop at, the estimated memory, and the command to train with, which includes the fixes that
are config keys. --write-config writes a complete config for the data and this machine. Without
--config-file, it contains all KEY VALUE pairs, and its schedule follows from them; the checks are
those of the detector in it, and its memory is not estimated. With --config-file, pairs belong to
that config: the written one contains those of DATASETS only, and the others are listed. The exit
code is 1 if there are errors. Copies of images that were mirrored or cropped are not detected.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from detectron2.config import CfgNode

from locreweight.command_line import ConfigArgumentParser, positive, reports_errors
from locreweight.config import load_config
from locreweight.engine.config_suggestion import base_and_options, check_is_new, write_config
from locreweight.engine.data_report import (
    DataReport,
    check_data,
    format_all_files,
    format_finding,
)
from locreweight.engine.run_folder import flatten_config
from locreweight.engine.startup_checks import schedule_findings
from locreweight.errors import UsageError


def training_command(args: argparse.Namespace, options: list[str]) -> str:
    """Shell command that trains with these options."""
    config = ["--config-file", args.config_file] if args.config_file else []
    return _command("train_net.py", args, config, options)


def repeat_command(args: argparse.Namespace, options: list[str]) -> str:
    """Shell command that writes a config with these options."""
    return _command(
        "tools/check_data.py", args, ["--write-config", str(args.write_config)], options
    )


def _command(script: str, args: argparse.Namespace, config: list[str], options: list[str]) -> str:
    gpus = ["--num-gpus", str(args.num_gpus)]
    method = ["--method", args.method] if args.method else []
    return shlex.join(["python", script, *gpus, *config, *method, *options])


def differing_keys(keys: list[str], cfg: CfgNode, written: CfgNode) -> list[str]:
    """Those of the keys whose values differ between two configs."""
    values, others = flatten_config(cfg), flatten_config(written)
    return [key for key in dict.fromkeys(keys) if values.get(key) != others.get(key)]


def write_checked_config(
    args: argparse.Namespace, report: DataReport, *, suggests_config: bool
) -> None:
    """Write the config of --write-config, and print the command to train with it and notes.

    Args:
        args: the arguments of the command line.
        report: the result of the checks.
        suggests_config: whether there is no --config-file. Otherwise keys other than those of the
            data belong to that config, and not to the base of the new one.

    Raises:
        UsageError: if the report has errors, or as :func:`write_config`.
    """
    file, sets = args.write_config, report.sets
    if sets is None or report.has_errors:
        raise UsageError("no config was written: fix the errors above first")
    keys = report.options[::2] if suggests_config else []
    written, start = write_config(
        file, report.cfg, sets, keys, method=args.method, num_gpus=args.num_gpus
    )
    command = _command("train_net.py", args, ["--config-file", str(file)], [])
    print(f"\nwrote {file}; to train with it:\n  {command}")
    if start:
        print(f"note: {start}")
    for finding in schedule_findings(written):
        print(format_finding(finding))
    left_out = [] if suggests_config else differing_keys(args.opts[::2], report.cfg, written)
    if left_out:
        print(
            f"note: it does not contain the values of {', '.join(left_out)}, which belong to "
            f"{args.config_file}"
        )


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = ConfigArgumentParser(description=__doc__)
    parser.add_argument("--config-file", default="", metavar="FILE", help="config of the training")
    parser.add_argument(
        "--method", default="", metavar="NAME", help="a method of configs/methods, or a file"
    )
    parser.add_argument(
        "--num-gpus", type=positive, default=1, help="number of GPUs that training will use"
    )
    parser.add_argument("--list", type=Path, metavar="FILE", help="write all findings with files")
    parser.add_argument(
        "--write-config",
        type=Path,
        metavar="FILE",
        help="write a config with data, classes, a detector for this machine, and a schedule",
    )
    return parser.parse_args(arguments)


@reports_errors
def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    logging.getLogger("detectron2").setLevel(logging.ERROR)
    if args.write_config:
        check_is_new(args.write_config)  # reading the images can take long
    suggests_config = args.write_config and not args.config_file
    if suggests_config:
        base, args.opts = base_and_options(args.opts)
        args.config_file = str(base)
    # The written config replaces SOLVER.STEPS of its base, which may not fit SOLVER.MAX_ITER.
    replaced = ["SOLVER.STEPS", "()"] if suggests_config else []
    report = check_data(
        lambda options: load_config(args.config_file, [*replaced, *options], args.method),
        args.opts,
        args.num_gpus,
    )
    if suggests_config:
        # The written config has the number of classes of the data, and another schedule.
        others = [f for f in report.findings if list(f.fixes) != ["MODEL.ROI_HEADS.NUM_CLASSES"]]
        of_base = schedule_findings(report.cfg)
        report = replace(report, findings=[f for f in others if f not in of_base])
    if report.overview:
        print(report.overview)
    for finding in report.findings:
        print(format_finding(finding))
    if not suggests_config:
        if report.training_values:
            print(f"\n{report.training_values}")
        condition = ", once the errors are fixed" if report.has_errors_without_fix else ""
        print(f"\nto train{condition}:\n  {training_command(args, report.options)}")
    elif report.has_errors and report.has_fixes:
        print(f"\nto repeat this with the fixes:\n  {repeat_command(args, report.options)}")
    print(f"\n{report.summary}")
    if report.has_fixes and not suggests_config:
        print("to check the fixes, run this again with the options of the command above")
    if args.list:
        args.list.parent.mkdir(parents=True, exist_ok=True)
        # File names can contain any bytes.
        args.list.write_text(format_all_files(report.findings), errors="surrogateescape")
    if args.write_config:
        write_checked_config(args, report, suggests_config=suggests_config)
    sys.exit(1 if report.has_errors else 0)


if __name__ == "__main__":
    main()
