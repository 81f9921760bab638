"""Write the results of a comparison: a CSV of all runs, a table of means, and a plot of AP."""

from __future__ import annotations

import csv
import io
import math
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import mean, median, stdev

from matplotlib.figure import Figure
from tabulate import tabulate

from ..engine.run_folder import RunFolder
from ..engine.run_queue import Run
from ..file_io import atomic_write_bytes

CSV, TABLE, CURVES = "results.csv", "table.md", "curves.png"

NOTES = """\
AP, AP50 and AP75 are those of the final teacher (of a supervised run: of its model), in percent:
the mean over the seeds and, with two or more seeds, the standard deviation. Datasets in Pascal VOC
format also have VOC's 11-point AP. Precision and recall are those of the pseudo-labels at the end
of training, measured where the unlabeled images have ground truth. Time is the median of an
iteration after burn-in, without evaluation. Memory is the maximum over the runs of the row.
Threshold, weight, keep rate and burn-in are the values that were used.
"""


@dataclass(frozen=True)
class RunResults:
    """Current results of one run; NaN where a value is unknown.

    Attributes:
        row: config and method.
        seed: seed of the run.
        finished: whether the run is trained and evaluated to the end.
        iterations: number of completed iterations.
        ap, ap50, ap75: of the teacher after the last iteration, in percent.
        voc_ap50: Pascal VOC's 11-point AP50 of the teacher, in percent, where it is measured.
        student_ap: of the student after the last iteration, in percent.
        precision, recall: last measurement of the pseudo-labels, in [0, 1]. They need ground truth
            of unlabeled images. Precision is unknown if there were no pseudo-labels.
        seconds_per_iteration: median after burn-in, without evaluation.
        peak_memory_mib: of the GPU or, on a CPU, the resident memory of a process.
        memory_of: "GPU" or "RAM".
        threshold, unsupervised_weight, ema_keep_rate, burn_in: settings of the run; NaN for a
            supervised run, which does not use them.
        max_iter: iterations of the whole run.
        commit, machine: where the run was started; several if they differ.
        output: ``OUTPUT_DIR``.
    """

    row: str
    seed: int
    finished: bool
    iterations: int
    ap: float
    ap50: float
    ap75: float
    voc_ap50: float
    student_ap: float
    precision: float
    recall: float
    seconds_per_iteration: float
    peak_memory_mib: float
    memory_of: str
    threshold: float
    unsupervised_weight: float
    ema_keep_rate: float
    burn_in: float
    max_iter: int
    commit: str
    machine: str
    output: str


def read_results(run: Run) -> RunResults | None:
    """Read the results of a run from its output folder; None if it has no metrics yet."""
    folder = run.folder
    if not folder.metrics:
        return None
    semi, end = run.cfg.SEMI, run.cfg.SOLVER.MAX_ITER
    is_supervised = semi.BURN_IN_ITERS >= end
    final = _evaluations(folder).get(end, {})
    peak_memory, memory_of = _peak_memory(folder)
    # Precision and recall of the same time: without pseudo-labels only recall is logged.
    pseudo_labels = folder.last_record_with("pseudo_truth/recall")
    return RunResults(
        row=run.row,
        seed=run.seed,
        finished=run.is_finished,
        iterations=run.iterations_done,
        ap=final.get("bbox/AP", math.nan),
        ap50=final.get("bbox/AP50", math.nan),
        ap75=final.get("bbox/AP75", math.nan),
        voc_ap50=final.get("voc_11_point/AP50", math.nan),
        student_ap=final.get("student/bbox/AP", math.nan),
        precision=pseudo_labels.get("pseudo_truth/precision", math.nan),
        recall=pseudo_labels.get("pseudo_truth/recall", math.nan),
        seconds_per_iteration=_seconds_per_iteration(folder, semi.BURN_IN_ITERS),
        peak_memory_mib=peak_memory,
        memory_of=memory_of,
        threshold=math.nan if is_supervised else semi.PSEUDO_LABEL_THRESHOLD,
        unsupervised_weight=math.nan if is_supervised else semi.UNSUPERVISED_WEIGHT,
        ema_keep_rate=math.nan if is_supervised else semi.EMA_KEEP_RATE,
        burn_in=math.nan if is_supervised else semi.BURN_IN_ITERS,
        max_iter=end,
        commit=", ".join(dict.fromkeys(start.commit for start in folder.starts)),
        machine="; ".join(dict.fromkeys(start.processors for start in folder.starts)),
        output=str(run.output),
    )


def write_report(runs: list[Run], output: Path) -> None:
    """Write ``results.csv``, ``table.md`` and ``curves.png``, replacing earlier ones.

    Args:
        runs: all runs of the comparison, finished or not.
        output: folder.
    """
    results = [result for run in runs if (result := read_results(run)) is not None]
    contents = {
        CSV: as_csv(results).encode(),
        TABLE: as_markdown(results).encode(),
        CURVES: draw_curves(runs),
    }
    for name, content in contents.items():
        # Readers never get an incomplete file.
        atomic_write_bytes(output / name, content)


def as_csv(results: list[RunResults]) -> str:
    """Return one line per run; unknown values are empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(RunResults)])
    writer.writeheader()
    for result in results:
        writer.writerow({k: "" if _is_nan(v) else v for k, v in asdict(result).items()})
    return text.getvalue()


def as_markdown(results: list[RunResults]) -> str:
    """Return a table of means over the finished runs of each row, and a table of all runs."""
    rows: dict[str, list[RunResults]] = {}
    for result in results:
        if result.finished:
            rows.setdefault(result.row, []).append(result)
    means = [_mean_row(row, members) for row, members in rows.items()]
    single = [_single_row(result) for result in results]
    return "\n".join([_table(means), "", NOTES, _table(single), ""])


def draw_curves(runs: list[Run]) -> bytes:
    """Plot the teacher's mean AP and its range over the seeds of each row, as PNG."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for row in dict.fromkeys(run.row for run in runs):
        evaluations = [_evaluations(run.folder) for run in runs if run.row == row]
        curves = [{done: x["bbox/AP"] for done, x in each.items()} for each in evaluations if each]
        if not curves:
            continue
        common = sorted(set.intersection(*(set(curve) for curve in curves)))
        values = [[curve[done] for curve in curves] for done in common]
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


def _evaluations(folder: RunFolder) -> dict[int, dict[str, float]]:
    # Detectron2 writes NaN for a model without detections: its average precision is 0.
    return {
        done: {name: 0.0 if math.isnan(value) else value for name, value in record.items()}
        for done, record in folder.evaluations.items()
    }


def _seconds_per_iteration(folder: RunFolder, burn_in: int) -> float:
    times = folder.curve("time")
    # All methods do the same during burn-in. What a method costs shows afterwards.
    after = [s for i, s in zip(times.iterations, times.values, strict=True) if i >= burn_in]
    return median(after or times.values) if times.values else math.nan


def _peak_memory(folder: RunFolder) -> tuple[float, str]:
    """Return MiB and "GPU" or "RAM". Detectron2 writes the memory of the GPU to its log only."""
    log = folder.path / "log.txt"
    on_gpu = re.findall(r"max_mem: (\d+)M", log.read_text()) if log.is_file() else []
    if on_gpu:
        return float(max(map(int, on_gpu))), "GPU"
    return max((attempt.peak_ram_mib for attempt in folder.attempts), default=math.nan), "RAM"


def _mean_row(row: str, members: list[RunResults]) -> dict[str, object]:
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


def _single_row(result: RunResults) -> dict[str, object]:
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
    """Return a Markdown table without the columns that are empty in all rows."""
    if not rows:
        return "No run is finished yet."
    names = dict.fromkeys(name for row in rows for name in row)
    used = [name for name in names if any(row.get(name, "") != "" for row in rows)]
    rows = [{name: row.get(name, "") for name in used} for row in rows]
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)


def _spread(values: list[float]) -> str:
    numbers = [value for value in values if not math.isnan(value)]
    if not numbers:
        return ""
    digits = ".2f" if max(map(abs, numbers)) >= 2 else ".3f"
    if len(numbers) == 1:
        return format(numbers[0], digits)
    return f"{mean(numbers):{digits}} ± {stdev(numbers):{digits}}"


def _number(value: float, digits: str) -> str:
    return "" if math.isnan(value) else format(value, digits)


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)
