#!/usr/bin/env python
"""Pack unlabeled images into tar shards for `shards:<index.json>`.

    python tools/make_shards.py --images photos --output shards

Copy the output folder to a disk or an object store, and set
`DATASETS.UNLABELED "('shards:s3://bucket/shards/index.json',)"`. If the program is stopped, run the
same command again: finished shards are kept.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from locreweight.command_line import HelpFormatter, reports_errors
from locreweight.data.datasets.shard_writer import write_shards


@reports_errors
def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--images", type=Path, required=True, help="folder, packed with its subfolders"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the shards")
    parser.add_argument(
        "--images-per-shard",
        type=int,
        default=2000,
        help="16 shards are used at the same time, so they must fit into the cache (default: 2000)",
    )
    args = parser.parse_args()
    try:
        index = write_shards(args.images, args.output, args.images_per_shard)
    except KeyboardInterrupt:
        sys.exit("stopped: run the same command again to continue")
    print(f"wrote {index}; use it as shards:{index} in DATASETS.UNLABELED")


if __name__ == "__main__":
    main()
