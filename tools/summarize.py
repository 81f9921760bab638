#!/usr/bin/env python
"""Print results of runs: teacher after burn-in, final student, final teacher.

    python tools/summarize.py output/quickstart [output/another ...]

F1 is the highest of all score thresholds, which the last column shows. With several test sets, the
results are those of the first. A folder that compare.py has written stands for all its runs; then
the means over the seeds are printed, too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from locreweight.command_line import HelpFormatter, reports_errors
from locreweight.engine.run_folder import describe_test_sets, open_runs, summary_table


@reports_errors
def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, help="OUTPUT_DIR of each run, or of a comparison"
    )
    runs = open_runs(parser.parse_args().runs)
    print(summary_table(runs) or "nothing has been evaluated yet")
    if warning := describe_test_sets(runs):
        print(f"warning: {warning}", file=sys.stderr)


if __name__ == "__main__":
    main()
