#!/usr/bin/env python
"""Plot how well the localization quality of detections predicts their IoU: the paper's Fig. 3.

    python tools/plot_localization_quality.py --weights output/mine --output fig3.png

Each point is a detection: its IoU with the ground truth against (a) its foreground score and (b)
its localization quality, with Pearson's and Spearman's correlation. (c) shows the calibration of
the variances from which the quality is computed: actual error against predicted variance, in the
units of the box coding. Calibrated variances are on the diagonal. One curve is the squared error,
the other one the error as in the loss (Eq. 9 grows more slowly than the square beyond an error of
1).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from matplotlib.figure import Figure
from tabulate import tabulate

from locreweight.command_line import (
    ConfigArgumentParser,
    add_checkpoint_arguments,
    check_outputs,
    positive,
    reports_errors,
)
from locreweight.engine.localization_analysis import (
    annotated_records,
    calibration,
    correlations,
    localize,
)
from locreweight.engine.predictor import Predictor
from locreweight.visualization.figures import plot_localization


def figure_file(text: str) -> Path:
    """Parse the file name of a figure."""
    if Path(text).suffix.lower()[1:] not in Figure().canvas.get_supported_filetypes():
        raise argparse.ArgumentTypeError(f"{text} is not a figure file: use a .png, .svg or .pdf")
    return Path(text)


@reports_errors
def main() -> None:
    parser = ConfigArgumentParser(description=__doc__)
    add_checkpoint_arguments(parser)
    parser.add_argument(
        "--dataset", default="", help="annotated dataset. Default: the first of DATASETS.TEST"
    )
    parser.add_argument(
        "--output", type=figure_file, required=True, help="the figure, .png, .svg or .pdf"
    )
    parser.add_argument("--json", type=Path, help="write the numbers to this file, too")
    parser.add_argument("--count", type=positive, help="maximum number of images. Default: all")
    args = parser.parse_args()
    check_outputs(args.output, args.json)
    detector = Predictor(args.weights, args.config_file, args.opts, args.device, last=args.last)
    data = localize(detector, annotated_records(detector, args.dataset, args.count))
    threshold = detector.cfg.SEMI.PSEUDO_LABEL_THRESHOLD
    args.output.parent.mkdir(parents=True, exist_ok=True)
    plot_localization(data, threshold).savefig(args.output, dpi=130)
    coefficients = correlations(data, threshold)
    rows = [[name, c.pearson, c.spearman, c.count] for name, c in coefficients.items()]
    headers = ["IoU against", "Pearson", "Spearman", "detections"]
    print(tabulate(rows, headers=headers, tablefmt="github", floatfmt=".3f"))
    if args.json:
        groups = calibration(data.variance, data.error)
        numbers = {
            "threshold": threshold,
            "correlations": {name: asdict(c) for name, c in coefficients.items()},
            "calibration": {name: values.tolist() for name, values in asdict(groups).items()},
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main()
