"""A comparison as a CSV of all runs, a table of means, and a plot of AP over iterations."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import asdict, fields
from pathlib import Path
from statistics import mean, stdev

from matplotlib.figure import Figure
from tabulate import tabulate

from ..engine.run_queue import Run
from ..engine.run_results import RunResults, curve_of, results_of
from ..file_io import atomic_write_bytes

CSV, TABLE, CURVES = "results.csv", "table.md", "curves.png"

NOTES = """\
AP, AP50 and AP75 are those of the final teacher (of a supervised run: of its model), in percent;
mean and, of two seeds or more, standard deviation over the seeds. Of Pascal VOC's layout there is
its own 11-point AP, too. Precision and recall are of the
pseudo-labels at the end, where the truth of unlabeled images is known. Time is the median of an
iteration after burn-in, without evaluation; memory is the largest of all runs of the row.
Threshold, weight, keep rate and burn-in are those that were used.
"""


def write_report(runs: list[Run], output: Path) -> None:
    """Write ``results.csv``, ``table.md`` and ``curves.png``, over those of before.

    Args:
        runs: finished, begun or waiting.
        output: folder.
    """
    results = [found for run in runs if (found := results_of(run)) is not None]
    contents = {
        CSV: as_csv(results).encode(),
        TABLE: as_markdown(results).encode(),
        CURVES: curves(runs),
    }
    for name, content in contents.items():
        # In one go: a table that is being looked at is never half a table.
        atomic_write_bytes(output / name, content)


def as_csv(results: list[RunResults]) -> str:
    """One line a run; empty where something is not known."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(RunResults)])
    writer.writeheader()
    for result in results:
        writer.writerow({k: "" if _unknown(v) else v for k, v in asdict(result).items()})
    return text.getvalue()


def as_markdown(results: list[RunResults]) -> str:
    """Means of the finished runs of each row, and each run."""
    rows: dict[str, list[RunResults]] = {}
    for result in results:
        if result.finished:
            rows.setdefault(result.row, []).append(result)
    summary = [_summary(row, members) for row, members in rows.items()]
    single = [_single(result) for result in results]
    return "\n".join([_table(summary), "", NOTES, _table(single), ""])


def curves(runs: list[Run]) -> bytes:
    """PNG: the mean AP over the seeds of each row, and the range between the least and the best."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for row in dict.fromkeys(run.row for run in runs):
        found = [curve for run in runs if run.row == row and (curve := curve_of(run))]
        if not found:
            continue
        common = sorted(set.intersection(*(set(curve) for curve in found)))
        values = [[curve[done] for curve in found] for done in common]
        (line,) = axes.plot(common, [mean(v) for v in values], marker="o", markersize=3, label=row)
        low, high = [min(v) for v in values], [max(v) for v in values]
        axes.fill_between(common, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel="iterations", ylabel="AP of the teacher, %", xlim=(0, None), ylim=(0, None))
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize="small")
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    return png.getvalue()


def _summary(row: str, members: list[RunResults]) -> dict[str, object]:
    first = members[0]
    return {
        "config": row,
        "seeds": ", ".join(str(result.seed) for result in members),
        "AP": _spread([result.ap for result in members]),
        "AP50": _spread([result.ap50 for result in members]),
        "AP75": _spread([result.ap75 for result in members]),
        "11-point AP50": _spread([result.voc_ap50 for result in members]),
        "precision": _spread([result.precision for result in members]),
        "recall": _spread([result.recall for result in members]),
        "s/iteration": _spread([result.seconds_per_iteration for result in members]),
        f"peak {first.memory_of}, MiB": _number(max(r.peak_memory_mib for r in members), ".0f"),
        "threshold": _number(first.threshold, "g"),
        "weight": _number(first.unsupervised_weight, "g"),
        "keep rate": _number(first.ema_keep_rate, "g"),
        "burn-in": _number(first.burn_in, ".0f"),
        "iterations": first.max_iter,
        "commit": ", ".join(dict.fromkeys(result.commit for result in members)),
        "machine": "; ".join(dict.fromkeys(result.machine for result in members)),
    }


def _single(result: RunResults) -> dict[str, object]:
    return {
        "config": result.row,
        "seed": result.seed,
        "iterations": f"{result.iterations} of {result.max_iter}",
        "AP": _number(result.ap, ".2f"),
        "AP50": _number(result.ap50, ".2f"),
        "AP75": _number(result.ap75, ".2f"),
        "student's AP": _number(result.student_ap, ".2f"),
        "commit": result.commit,
        "machine": result.machine,
    }


def _table(rows: list[dict[str, object]]) -> str:
    if not rows:
        return "No run has been finished yet."
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)


def _spread(values: list[float]) -> str:
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return ""
    digits = ".2f" if max(map(abs, known)) >= 2 else ".3f"
    if len(known) == 1:
        return format(known[0], digits)
    return f"{mean(known):{digits}} ± {stdev(known):{digits}}"


def _number(value: float, digits: str) -> str:
    return "" if math.isnan(value) else format(value, digits)


def _unknown(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)
