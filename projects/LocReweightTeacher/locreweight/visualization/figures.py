"""Figures: metrics of runs, and the paper's Fig. 3 (localization quality against IoU).

Figures for the report are SVG in the text color of the page, for light and dark pages.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..engine.detection_analysis import RECALLS, THRESHOLDS, DetectionAnalysis
from ..engine.localization_analysis import Localization, calibration, correlations
from ..engine.run_folder import Curve, RunFolder, RunGroup

# Of medium lightness, to be visible on white and on black. Color-blind people can tell them apart.
COLORS = ("#3b8fd6", "#e8762d", "#1f9e76", "#c25db0", "#a58a00", "#d1495b")
STYLES = ("-", "--", "-.", ":")
_TEXT_COLOR = "#010203"  # placeholder for the text color of the page
_SIZE = (4.4, 2.8)  # inches: about the width of a phone, where text then keeps its size


@dataclass(frozen=True)
class WebFigure:
    """A figure as SVG with its text alternative."""

    svg: Markup
    alt: str
    caption: str


@dataclass(frozen=True)
class Line:
    """A labeled curve of a plot."""

    label: str
    curve: Curve


def run_figures(run: RunFolder) -> list[WebFigure]:
    """Plot the metrics of one run. Plots without any values are left out."""
    plots = [
        ("AP50:95 in percent", "AP on the test images", _lines(run, teacher_student())),
        ("AP50 in percent", "AP50 on the test images", _lines(run, teacher_student("AP50"))),
        ("loss", "Losses on labeled images", _lines(run, losses(""))),
        ("loss", "Losses on unlabeled images, weighted", _lines(run, losses("_unlabeled"))),
        ("number", "Pseudo-labels per image", _lines(run, {"": "pseudo_labels/per_image"})),
        ("share or score", "Pseudo-labels in training", _lines(run, pseudo_labels())),
        ("share", "Pseudo-labels against the ground truth", _lines(run, ground_truth_agreement())),
        *(
            ("share", f"{title}, by quarter of localization quality", _lines(run, quarters(key)))
            for title, key in (("Precision", "precision"), ("Mean IoU", "mean_iou"))
        ),
        ("reliability", "Reliability of proposals (Eq. 12, 13)", _lines(run, reliability())),
    ]
    return [
        line_figure(lines, ylabel, caption, run.burn_in)
        for ylabel, caption, lines in plots
        if lines
    ]


def comparison_figures(groups: Sequence[RunGroup]) -> list[WebFigure]:
    """Plot the same metrics of several runs, and means over seeds."""
    plots = [
        ("AP50:95 in percent", "AP of the teacher", "bbox/AP"),
        ("AP50:95 in percent", "AP of the student", "student/bbox/AP"),
        ("number", "Pseudo-labels per image", "pseudo_labels/per_image"),
        ("share", "Precision of pseudo-labels", "pseudo_truth/precision"),
        ("share", "Recall of pseudo-labels", "pseudo_truth/recall"),
    ]
    burn_ins = {run.burn_in for group in groups for run in group.runs}
    shared = burn_ins.pop() if len(burn_ins) == 1 else 0
    figures = []
    for ylabel, caption, key in plots:
        lines = [
            Line(group.name, mean_curve([run.curve(key) for run in group.runs])) for group in groups
        ]
        lines = [line for line in lines if line.curve.values]
        if lines:
            figures.append(line_figure(lines, ylabel, caption, shared))
    return figures


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Return the mean of several curves at the iterations that all of them have."""
    values = [dict(zip(curve.iterations, curve.values, strict=True)) for curve in curves]
    common = sorted(set.intersection(*(set(each) for each in values)))
    return Curve(common, [float(np.mean([each[i] for each in values])) for i in common])


def analysis_figures(analysis: DetectionAnalysis) -> list[WebFigure]:
    """Plot precision against recall of each class, and F1 against the score threshold."""
    known = [each for each in analysis.classes if each.precisions]
    shown = sorted(known, key=lambda each: -each.boxes)[: len(COLORS)]

    def precision_recall(axes: Axes) -> None:
        for each, color in zip(shown, COLORS, strict=False):
            axes.plot(RECALLS, each.precisions, color=color, lw=1.6, label=each.name)
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.05))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize="small", frameon=False)

    def thresholds(axes: Axes) -> None:
        points = analysis.curve
        precision = [np.nan if p.precision is None else p.precision for p in points]
        series = {
            "F1": [point.f1 for point in points],
            "precision": precision,
            "recall": [point.recall for point in points],
        }
        for (name, values), color, style in zip(series.items(), COLORS, STYLES, strict=False):
            axes.plot(THRESHOLDS, values, style, color=color, lw=1.6, label=name)
        if analysis.best:
            axes.axvline(analysis.best.threshold, color="gray", lw=1)
        axes.set(xlabel="score threshold", ylabel="share", xlim=(0, 1), ylim=(0, 1.05))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize="small", frameon=False)

    left_out = len(known) - len(shown)
    most = f", of the {len(shown)} classes with the most boxes" if left_out else ""
    best = analysis.best
    at_best = f"; the best F1 is {best.f1:.2f} at {best.threshold:.2f}" if best else ""
    precisions = "; ".join(f"{c.name}: AP50 {c.ap50:.1f}" for c in shown)
    return [
        _figure(
            precision_recall,
            f"Line plot, precision against recall at IoU 0.5{most}. {precisions}",
            f"Precision against recall at IoU 0.5{most}",
        ),
        _figure(
            thresholds,
            f"Line plot, F1, precision and recall against the score threshold{at_best}",
            f"Score threshold: all classes together{at_best}",
        ),
    ]


def localization_figures(data: Localization, threshold: float) -> list[WebFigure]:
    """Draw the panels of :func:`plot_localization` for the report."""
    count = len(data.iou)

    def against(name: str) -> Callable[[Axes], None]:
        return lambda axes: plot_against_iou(axes, data, name, threshold)

    return [
        _figure(
            against("score"),
            f"Scatter plot: IoU with ground truth against foreground score of {count} detections",
            "(a) IoU against foreground score; r is Pearson's, ρ Spearman's correlation",
        ),
        _figure(
            against("quality"),
            f"Scatter plot: IoU with ground truth against localization quality of {count} "
            "detections",
            "(b) IoU against localization quality",
        ),
        _figure(
            lambda axes: plot_calibration(axes, data),
            "Predicted variance against actual error, in ten groups, with the diagonal",
            "(c) Predicted variance against actual error, in the units of the box coding",
        ),
    ]


def plot_localization(data: Localization, threshold: float) -> Figure:
    """Plot the paper's Fig. 3 and the calibration of the variances in three panels.

    Args:
        data: all detections.
        threshold: detections above this score would be pseudo-labels.
    """
    figure = Figure(figsize=(11.0, 3.8), layout="constrained")
    by_score, by_quality, variances = figure.subplots(1, 3)
    plot_against_iou(by_score, data, "score", threshold)
    plot_against_iou(by_quality, data, "quality", threshold)
    plot_calibration(variances, data)
    for axes, letter in zip((by_score, by_quality, variances), "abc", strict=True):
        axes.set_title(f"({letter})", loc="left")
    return figure


def plot_against_iou(axes: Axes, data: Localization, name: str, threshold: float) -> None:
    """Plot IoU against ``name``, "score" or "quality", with the correlations in the legend."""
    coefficients, is_label = correlations(data, threshold), data.score > threshold
    values = getattr(data, name)
    groups = ((~is_label, COLORS[0], "all"), (is_label, COLORS[1], "pseudo-labels"))
    for selected, color, group in groups:
        r = coefficients[f"{name}, {group}"]
        text = f"{group}: r {r.pearson:.2f}, ρ {r.spearman:.2f}, n {r.count}"
        # Rasterized: thousands of vector shapes would make a large file.
        axes.scatter(
            values[selected], data.iou[selected], s=6, alpha=0.5, lw=0, color=color, rasterized=True
        )
        axes.scatter([], [], s=20, color=color, label=text)
    label = {"score": "foreground score", "quality": "localization quality"}[name]
    axes.set(xlabel=label, ylabel="IoU with ground truth", ylim=(-0.02, 1.3))
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.legend(loc="upper left", fontsize="small", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def plot_calibration(axes: Axes, data: Localization) -> None:
    """Plot actual squared error against predicted variance, in squared units of the box coding."""
    axes.set(xlabel="predicted variance", ylabel="actual error")
    axes.spines[["top", "right"]].set_visible(False)
    if not data.variance.size:
        return
    groups = calibration(data.variance, data.error)
    values = np.concatenate([groups.variance, groups.squared_error, groups.fitted_error])
    ends = [values[values > 0].min() * 0.8, values.max() * 1.25]
    axes.plot(ends, ends, "--", lw=1, color="gray", label="calibrated")
    squared, fitted = COLORS[0], COLORS[2]
    axes.plot(
        groups.variance, groups.squared_error, "o-", ms=4, color=squared, label="squared error"
    )
    axes.plot(groups.variance, groups.fitted_error, "s-", ms=4, color=fitted, label="Eq. 8 and 9")
    axes.set(xscale="log", yscale="log")
    axes.legend(loc="upper left", fontsize="small", frameon=False)


def line_figure(lines: Sequence[Line], ylabel: str, caption: str, burn_in: int) -> WebFigure:
    """Plot curves over the iterations, with burn-in shaded."""

    def plot(axes: Axes) -> None:
        for i, line in enumerate(lines):
            # Markers show where sparse values were measured.
            marker = "o" if len(line.curve.values) < 15 else ""
            style = STYLES[i // len(COLORS) % len(STYLES)]
            color = COLORS[i % len(COLORS)]
            axes.plot(
                line.curve.iterations,
                line.curve.values,
                style,
                marker=marker,
                ms=4,
                lw=1.6,
                color=color,
                label=line.label,
            )
        if burn_in:
            axes.axvspan(0, burn_in, color="gray", alpha=0.18, lw=0, label="burn-in")
        axes.set(xlabel="iteration", ylabel=ylabel)
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
        if len(lines) > 1 or burn_in:
            axes.legend(fontsize="small", frameon=False)

    descriptions = [
        f"{line.label or caption} from {line.curve.values[0]:.3g} at iteration "
        f"{line.curve.iterations[0]} to {line.curve.values[-1]:.3g} at {line.curve.iterations[-1]}"
        for line in lines
    ]
    return _figure(plot, f"Line plot, {caption}: {'; '.join(descriptions)}", caption)


# Metrics that are plotted together: label -> name in metrics.json


def teacher_student(metric: str = "AP") -> dict[str, str]:
    return {"teacher": f"bbox/{metric}", "student": f"student/bbox/{metric}"}


def losses(suffix: str) -> dict[str, str]:
    names = {"classes": "loss_cls", "boxes": "loss_box_reg"}
    names |= {"RPN objectness": "loss_rpn_cls", "RPN boxes": "loss_rpn_loc"}
    return {label: name + suffix for label, name in names.items()}


def pseudo_labels() -> dict[str, str]:
    return {
        "images without": "pseudo_labels/images_without",
        "localization quality": "pseudo_labels/localization_quality",
        "highest score": "pseudo_labels/highest_score",
    }


def ground_truth_agreement() -> dict[str, str]:
    names = {"precision": "precision", "recall": "recall", "mean IoU": "mean_iou"}
    return {label: f"pseudo_truth/{name}" for label, name in names.items()}


def quarters(name: str) -> dict[str, str]:
    labels = ("lowest", "second", "third", "highest")
    return {label: f"pseudo_truth/quality_quarter_{i}/{name}" for i, label in enumerate(labels, 1)}


def reliability() -> dict[str, str]:
    return {
        "foreground": "proposals/reliability_foreground",
        "background": "proposals/reliability_background",
    }


def _lines(run: RunFolder, names: dict[str, str]) -> list[Line]:
    lines = [Line(label, run.curve(name)) for label, name in names.items()]
    return [line for line in lines if line.curve.values]


def _figure(plot: Callable[[Axes], None], alt: str, caption: str) -> WebFigure:
    colors = dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"),
        _TEXT_COLOR,
    )
    # Keep text as text: it can be searched and uses the font of the page.
    with matplotlib.rc_context({**colors, "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=_SIZE, layout="constrained")
        plot(figure.subplots())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, dpi=160, metadata={"Date": None})
    return WebFigure(Markup(_for_page(file.getvalue(), alt)), alt, caption)


def _for_page(svg: str, alt: str) -> str:
    """Return the <svg> element with the text color and font of the page and with unique ids."""
    svg = svg[svg.index("<svg") :].replace(_TEXT_COLOR, "currentColor")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px; font-family: inherit", svg)
    used = set(re.findall(r"(?:#|url\(#)([\w.-]+)", svg))
    unique = f"{zlib.crc32((svg + alt).encode()):x}"
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{m[1]}-{unique}"' if m[1] in used else "", svg)
    svg = re.sub(r'(xlink:href="#|url\(#)([\w.-]+)', rf"\1\2-{unique}", svg)
    label = Markup.escape(alt)
    return re.sub(r"<svg ", f'<svg role="img" aria-label="{label}" ', svg, count=1)
