#!/usr/bin/env python
"""Does the localization quality tell good boxes from bad ones? The paper's Fig. 3, for your model.

    python tools/plot_localization_quality.py --weights output/mine --output fig3.png

Each point is a detection: its IoU with the ground truth against (a) its foreground score and (b)
its localization quality, with Pearson's and Spearman's correlation. (c) is the calibration of the
variances that the quality is made of: predicted variance against actual error, in the units of the
box coding; on the diagonal a prediction means what it says. The error is squared, and, in a second
curve, as the loss takes it (Eq. 9 grows slower than the square beyond an error of 1).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tabulate import tabulate

from locreweight.engine.localization_analysis import (
    Correlation,
    Localization,
    annotated_records,
    calibration,
    correlation,
    localize,
)
from locreweight.engine.matching import IOU_THRESHOLD
from locreweight.engine.predictor import load_predictor
from locreweight.errors import UsageError
from predict import add_checkpoint_arguments

# Of medium lightness: they can be seen on white and on black.
ALL, CHOSEN, FITTED = "#3b8fd6", "#e8762d", "#1f9e76"


def measure(data: Localization, threshold: float) -> dict[str, Correlation]:
    """Correlations of IoU with score and with quality, over different groups of detections.

    Args:
        data: of all detections.
        threshold: a detection above this score would be a pseudo-label.

    Returns:
        over all, over would-be pseudo-labels, and over those that overlap an object by at least
        0.5, where labels that are missing from the ground truth do not count.
    """
    groups = {
        "all": np.full(len(data.iou), True),
        "pseudo-labels": data.score > threshold,
        "on objects": data.iou >= IOU_THRESHOLD,
    }
    return {
        f"{name}, {group}": correlation(data.iou[chosen], getattr(data, name)[chosen])
        for group, chosen in groups.items()
        for name in ("score", "quality")
    }


def plot(data: Localization, threshold: float) -> Figure:
    """The three panels side by side."""
    figure = Figure(figsize=(11.0, 3.8), layout="constrained")
    by_score, by_quality, variances = figure.subplots(1, 3)
    plot_against_iou(by_score, data, "score", threshold)
    plot_against_iou(by_quality, data, "quality", threshold)
    plot_calibration(variances, data)
    for axes, letter in zip((by_score, by_quality, variances), "abc", strict=True):
        axes.set_title(f"({letter})", loc="left")
    return figure


def plot_against_iou(axes: Axes, data: Localization, name: str, threshold: float) -> None:
    """IoU against ``name``, "score" or "quality", with the correlations in the legend."""
    correlations, chosen = measure(data, threshold), data.score > threshold
    values = getattr(data, name)
    for part, color, group in ((~chosen, ALL, "all"), (chosen, CHOSEN, "pseudo-labels")):
        r = correlations[f"{name}, {group}"]
        text = f"{group}: r {r.pearson:.2f}, ρ {r.spearman:.2f}, n {r.count}"
        # One picture and not a thousand shapes, where the format is one of shapes.
        axes.scatter(
            values[part], data.iou[part], s=6, alpha=0.5, lw=0, color=color, rasterized=True
        )
        axes.scatter([], [], s=20, color=color, label=text)
    label = {"score": "foreground score", "quality": "localization quality"}[name]
    axes.set(xlabel=label, ylabel="IoU with ground truth", ylim=(-0.02, 1.3))
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.legend(loc="upper left", fontsize="small", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def plot_calibration(axes: Axes, data: Localization) -> None:
    """Actual error against predicted variance, both in the units of the box coding, squared."""
    axes.set(xlabel="predicted variance", ylabel="actual error")
    axes.spines[["top", "right"]].set_visible(False)
    if not data.variance.size:
        return
    groups = calibration(data.variance, data.error)
    values = np.concatenate([groups.variance, groups.squared_error, groups.fitted_error])
    ends = [values[values > 0].min() * 0.8, values.max() * 1.25]
    axes.plot(ends, ends, "--", lw=1, color="gray", label="calibrated")
    axes.plot(groups.variance, groups.squared_error, "o-", ms=4, color=ALL, label="squared error")
    axes.plot(groups.variance, groups.fitted_error, "s-", ms=4, color=FITTED, label="Eq. 8 and 9")
    axes.set(xscale="log", yscale="log")
    axes.legend(loc="upper left", fontsize="small", frameon=False)


def figure_file(given: str) -> Path:
    """A file that a figure can be written to, of the command line: argparse tells of others."""
    if Path(given).suffix.lower()[1:] not in Figure().canvas.get_supported_filetypes():
        raise argparse.ArgumentTypeError(
            f"{given} is no name of a figure: name a .png, .svg or .pdf"
        )
    return Path(given)


def table(correlations: dict[str, Correlation]) -> str:
    """The correlations in Markdown."""
    rows = [[name, c.pearson, c.spearman, c.count] for name, c in correlations.items()]
    headers = ["IoU against", "Pearson", "Spearman", "detections"]
    return tabulate(rows, headers=headers, tablefmt="github", floatfmt=".3f")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_checkpoint_arguments(parser)
    parser.add_argument("--dataset", default="", help="annotated; else the first of DATASETS.TEST")
    parser.add_argument(
        "--output", type=figure_file, required=True, help="the figure: .png, .svg or .pdf"
    )
    parser.add_argument("--json", type=Path, help="write the numbers into this file")
    parser.add_argument("--count", type=int, help="look at so many images at most")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs of the config")
    args = parser.parse_args()
    try:
        detector = load_predictor(args.weights, args.config_file, args.opts, args.device)
        data = localize(detector, annotated_records(detector, args.dataset, args.count))
    except UsageError as error:
        sys.exit(f"error: {error}")
    threshold = detector.cfg.SEMI.PSEUDO_LABEL_THRESHOLD
    args.output.parent.mkdir(parents=True, exist_ok=True)
    plot(data, threshold).savefig(args.output, dpi=130)
    correlations = measure(data, threshold)
    print(table(correlations))
    if args.json:
        groups = calibration(data.variance, data.error)
        numbers = {
            "threshold": threshold,
            "correlations": {name: asdict(c) for name, c in correlations.items()},
            "calibration": {name: values.tolist() for name, values in asdict(groups).items()},
        }
        args.json.write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main()
