#!/usr/bin/env python
"""Write an HTML report of a run, or one that compares several runs.

    python tools/report.py output/quickstart [output/another ...]

The report shows results, also by class, curves, pictures, the config and how to reproduce the run.
It is one file that needs neither a server nor a network. It can also be written during training.
A folder that compare.py has written stands for all its runs; details are those of the first seed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from locreweight.command_line import (
    HelpFormatter,
    add_device_argument,
    check_outputs,
    non_negative,
    reports_errors,
)
from locreweight.visualization.report import write_report


@reports_errors
def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, help="OUTPUT_DIR of each run, or folder of a comparison"
    )
    parser.add_argument(
        "--output", type=Path, help="HTML file. Default: report.html in the first OUTPUT_DIR"
    )
    parser.add_argument(
        "--images",
        type=non_negative,
        default=200,
        help="maximum number of test images; 0 leaves out all detections",
    )
    add_device_argument(parser)
    args = parser.parse_args()
    output = args.output or args.runs[0] / "report.html"
    check_outputs(output)
    write_report(args.runs, output, args.images, args.device)
    print(f"report: {output}")


if __name__ == "__main__":
    main()
