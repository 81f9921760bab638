#!/usr/bin/env python
"""Print results of runs: teacher after burn-in, final student, final teacher.

python tools/summarize.py output/quickstart [output/another ...]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from locreweight.command_line import HelpFormatter
from locreweight.engine.run_folder import open_runs, summary_table
from locreweight.errors import UsageError


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, help="OUTPUT_DIR of each run")
    try:
        print(summary_table(open_runs(parser.parse_args().runs)))
    except UsageError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
