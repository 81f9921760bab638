"""Figures for a web page: SVG that takes its ink from the page, so that it fits light and dark."""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from plot_localization_quality import plot_against_iou, plot_calibration

from ..engine.localization_analysis import Localization
from ..engine.run_folder import Curve, RunFolder

# Of medium lightness: they can be seen on white and on black, and told apart by the color-blind.
COLORS = ("#3b8fd6", "#e8762d", "#1f9e76", "#c25db0", "#a58a00", "#d1495b")
STYLES = ("-", "--", "-.", ":")
_INK = "#010203"  # stands for the color of the page's text
_SIZE = (4.4, 2.8)  # inches; a phone's width, so that letters keep their size there


@dataclass(frozen=True)
class WebFigure:
    """A drawn figure with the words for those who do not see it."""

    svg: Markup
    alt: str
    caption: str


@dataclass(frozen=True)
class Line:
    """One curve of a plot."""

    label: str
    curve: Curve


def run_figures(run: RunFolder) -> list[WebFigure]:
    """The curves of one run; those for which nothing was measured are left out."""
    plots = [
        ("AP50:95 in percent", "AP on the test images", _named(run, teacher_student())),
        ("AP50 in percent", "AP50 on the test images", _named(run, teacher_student("AP50"))),
        ("loss", "Losses on labeled images", _named(run, losses(""))),
        ("loss", "Losses on unlabeled images, weighted", _named(run, losses("_unlabeled"))),
        ("number", "Pseudo-labels per image", _named(run, {"": "pseudo_labels/per_image"})),
        ("share or score", "Pseudo-labels in training", _named(run, pseudo_labels())),
        ("share", "Pseudo-labels against the hidden truth", _named(run, truth())),
        *(
            ("share", f"{title}, by quarter of localization quality", _named(run, quarters(key)))
            for title, key in (("Precision", "precision"), ("Mean IoU", "mean_iou"))
        ),
        ("reliability", "Reliability of proposals (Eq. 12, 13)", _named(run, reliability())),
    ]
    return [
        line_figure(lines, ylabel, caption, run.burn_in)
        for ylabel, caption, lines in plots
        if lines
    ]


def compared_figures(runs: Sequence[RunFolder]) -> list[WebFigure]:
    """The same curves of several runs."""
    plots = [
        ("AP50:95 in percent", "AP of the teacher", "bbox/AP"),
        ("AP50:95 in percent", "AP of the student", "student/bbox/AP"),
        ("number", "Pseudo-labels per image", "pseudo_labels/per_image"),
        ("share", "Precision of pseudo-labels", "pseudo_truth/precision"),
        ("share", "Recall of pseudo-labels", "pseudo_truth/recall"),
    ]
    burn_ins = {run.burn_in for run in runs}
    shared = burn_ins.pop() if len(burn_ins) == 1 else 0
    figures = []
    for ylabel, caption, key in plots:
        lines = [Line(run.name, run.curve(key)) for run in runs]
        lines = [line for line in lines if line.curve.values]
        if lines:
            figures.append(line_figure(lines, ylabel, caption, shared))
    return figures


def localization_figures(data: Localization, threshold: float) -> list[WebFigure]:
    """The paper's Fig. 3, and the calibration of the variances."""
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


def line_figure(lines: Sequence[Line], ylabel: str, caption: str, burn_in: int) -> WebFigure:
    """Curves over the iterations, with burn-in shaded."""

    def plot(axes: Axes) -> None:
        for i, line in enumerate(lines):
            # Few points are measurements of their own, many are a course.
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

    ends = [
        f"{line.label or caption} from {line.curve.values[0]:.3g} at iteration "
        f"{line.curve.iterations[0]} to {line.curve.values[-1]:.3g} at {line.curve.iterations[-1]}"
        for line in lines
    ]
    return _figure(plot, f"Line plot, {caption}: {'; '.join(ends)}", caption)


# -- which numbers are plotted together: label -> name in the metrics ------------------------------


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


def truth() -> dict[str, str]:
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


def _named(run: RunFolder, names: dict[str, str]) -> list[Line]:
    lines = [Line(label, run.curve(name)) for label, name in names.items()]
    return [line for line in lines if line.curve.values]


def _figure(plot: Callable[[Axes], None], alt: str, caption: str) -> WebFigure:
    ink = dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK
    )
    # Letters stay letters: they can be searched, and take the page's font.
    with matplotlib.rc_context({**ink, "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=_SIZE, layout="constrained")
        plot(figure.subplots())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, dpi=160, metadata={"Date": None})
    return WebFigure(Markup(_for_page(file.getvalue(), alt)), alt, caption)


def _for_page(svg: str, alt: str) -> str:
    """The SVG element alone, in the page's ink and font, without names that figures would share."""
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px; font-family: inherit", svg)
    used = set(re.findall(r"(?:#|url\(#)([\w.-]+)", svg))
    unique = f"{zlib.crc32((svg + alt).encode()):x}"
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{m[1]}-{unique}"' if m[1] in used else "", svg)
    svg = re.sub(r'(xlink:href="#|url\(#)([\w.-]+)', rf"\1\2-{unique}", svg)
    label = Markup.escape(alt)
    return re.sub(r"<svg ", f'<svg role="img" aria-label="{label}" ', svg, count=1)
