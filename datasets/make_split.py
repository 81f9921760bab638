#!/usr/bin/env python
"""Write the labeled images of splits to a file, so that others can use the same splits.

    python datasets/make_split.py --config-file configs/coco/standard-10.yaml \\
        --percent 1 5 10 --seeds 1 2 3 4 5 --output datasets/splits/coco.json

Splits are drawn from all images of DATASETS.TRAIN, including images without boxes, in the same way
as in training: DATASETS.SPLIT_FILE datasets/splits/coco.json gives the same labeled images as no
file, but is an error if the annotations differ from those that the file was made for.
"""

from __future__ import annotations

from pathlib import Path

from detectron2.data import DatasetCatalog

from locreweight.command_line import ConfigArgumentParser, count_of, reports_errors
from locreweight.config import load_config
from locreweight.data.datasets.splits import write_split_file
from locreweight.data.training_sets import register_datasets


@reports_errors
def main(arguments: list[str] | None = None) -> None:
    parser = ConfigArgumentParser(description=__doc__)
    parser.add_argument(
        "--config-file", default="", metavar="FILE", help="config with DATASETS.TRAIN"
    )
    parser.add_argument(
        "--percent",
        type=float,
        nargs="+",
        default=[1.0, 5.0, 10.0],
        help="percentages of labeled images",
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="seeds of the splits"
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="json file to write"
    )
    args = parser.parse_args(arguments)
    unused = ("DATASETS.TEST", "DATASETS.UNLABELED", "DATASETS.UNLABELED_TRUTH")
    empty = [part for key in unused for part in (key, "()")]
    cfg = load_config(args.config_file, [*args.opts, *empty])
    register_datasets(cfg)
    annotated = {name: DatasetCatalog.get(name) for name in cfg.DATASETS.TRAIN}
    write_split_file(args.output, annotated, args.percent, args.seeds)
    images = sum(map(len, annotated.values()))
    count = len(args.percent) * len(args.seeds)
    print(f"{args.output}: {count_of(count, 'split')} of {count_of(images, 'image')}")


if __name__ == "__main__":
    main()
