"""What a run's folder says of it: for tables that put runs side by side."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import yaml

from summarize import config_of, evaluations_of, metrics_of

from .run_queue import Run, read_attempts
from .run_record import read_run_records

NAN = math.nan


@dataclass(frozen=True)
class RunResults:
    """One run as it stands; NaN for what is not known.

    Attributes:
        row: config and method.
        seed: of the run.
        finished: nothing is left to do.
        iterations: done until now.
        ap, ap50, ap75: of the teacher after the last iteration, in percent.
        voc_ap50: Pascal VOC's 11-point AP then, where it is measured.
        student_ap: of the student then.
        precision, recall: of the pseudo-labels, last measured, in [0, 1]; known where the truth of
            unlabeled images is. Without pseudo-labels there is no precision.
        seconds_per_iteration: median after burn-in; without evaluation.
        peak_memory_mib: of the GPU, or the resident memory of a process where there is none.
        memory_of: "GPU" or "RAM".
        threshold, unsupervised_weight, ema_keep_rate, burn_in: what was used; NaN for a supervised
            run, which uses none.
        max_iter: iterations of the whole run.
        commit, machine: those that it was started on; several if they differ.
        output: the folder.
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


def results_of(run: Run) -> RunResults | None:
    """The results of a run; None if it has not begun."""
    if not (run.output / "metrics.json").is_file():
        return None
    metrics = metrics_of(run.output)
    final = _evaluations(run).get(run.cfg.SOLVER.MAX_ITER, {})
    semi, supervised = run.cfg.SEMI, run.cfg.SEMI.BURN_IN_ITERS >= run.cfg.SOLVER.MAX_ITER
    peak, memory_of = _peak_memory(run)
    starts = read_run_records(run.output)
    labels = _last_with(metrics, "pseudo_truth/recall")
    return RunResults(
        row=run.row,
        seed=run.seed,
        finished=is_finished(run),
        iterations=iterations_of(run),
        ap=final.get("bbox/AP", NAN),
        ap50=final.get("bbox/AP50", NAN),
        ap75=final.get("bbox/AP75", NAN),
        voc_ap50=final.get("voc_11_point/AP50", NAN),
        student_ap=final.get("student/bbox/AP", NAN),
        precision=labels.get("pseudo_truth/precision", NAN),
        recall=labels.get("pseudo_truth/recall", NAN),
        seconds_per_iteration=_seconds_per_iteration(metrics, semi.BURN_IN_ITERS),
        peak_memory_mib=peak,
        memory_of=memory_of,
        threshold=NAN if supervised else semi.PSEUDO_LABEL_THRESHOLD,
        unsupervised_weight=NAN if supervised else semi.UNSUPERVISED_WEIGHT,
        ema_keep_rate=NAN if supervised else semi.EMA_KEEP_RATE,
        burn_in=NAN if supervised else semi.BURN_IN_ITERS,
        max_iter=run.cfg.SOLVER.MAX_ITER,
        commit=", ".join(dict.fromkeys(start.commit for start in starts)),
        machine="; ".join(dict.fromkeys(start.processors for start in starts)),
        output=str(run.output),
    )


def curve_of(run: Run) -> dict[int, float]:
    """Iterations done -> AP of the teacher in percent."""
    if not (run.output / "metrics.json").is_file():
        return {}
    return {done: x["bbox/AP"] for done, x in sorted(_evaluations(run).items())}


def _evaluations(run: Run) -> dict[int, dict[str, float]]:
    # Detectron2 writes NaN for a model that has found nothing: its average precision is 0.
    return {
        done: {name: 0.0 if math.isnan(value) else value for name, value in found.items()}
        for done, found in evaluations_of(run.output).items()
    }


def iterations_of(run: Run) -> int:
    """How many iterations a run has done."""
    file = run.output / "metrics.json"
    metrics = metrics_of(run.output) if file.is_file() else []
    return min(max((x["iteration"] + 1 for x in metrics), default=0), run.cfg.SOLVER.MAX_ITER)


def is_finished(run: Run) -> bool:
    """Whether there is nothing left to do: trained to the end, and evaluated if there is a test."""
    if not (run.output / "model_final.pth").is_file():
        return False
    return not run.cfg.DATASETS.TEST or run.cfg.SOLVER.MAX_ITER in curve_of(run)


def changed_settings(run: Run) -> list[str]:
    """Keys whose values are not those that the run in this folder was begun with."""
    if not (run.output / "config.yaml").is_file():
        return []
    before = flatten_config(
        config_of(run.output) or {}
    )  # empty where a start was killed that early
    now = flatten_config(yaml.safe_load(run.cfg.dump()))
    # A key that one of the two does not know came or went with a version of the project.
    return [
        f"{key} was {before[key]!r}, now {now[key]!r}"
        for key in sorted(before.keys() & now.keys())
        if before[key] != now[key]
    ]


def flatten_config(node: dict, prefix: str = "") -> dict[str, object]:
    """Dotted path -> value of all keys below a node of a config."""
    found: dict[str, object] = {}
    for key, value in node.items():
        inner = isinstance(value, dict)
        found |= flatten_config(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return found


def _last_with(metrics: list[dict[str, float]], name: str) -> dict[str, float]:
    return next((record for record in reversed(metrics) if name in record), {})


def _seconds_per_iteration(metrics: list[dict[str, float]], burn_in: int) -> float:
    times = {record["iteration"]: record["time"] for record in metrics if "time" in record}
    # Burn-in is the same for all methods; what a method costs is seen after it.
    after = [seconds for iteration, seconds in times.items() if iteration >= burn_in]
    return median(after or times.values()) if times else NAN


def _peak_memory(run: Run) -> tuple[float, str]:
    """MiB, and of what. Detectron2 writes that of the GPU into its log only."""
    log: Path = run.output / "log.txt"
    on_gpu = re.findall(r"max_mem: (\d+)M", log.read_text()) if log.is_file() else []
    if on_gpu:
        return float(max(map(int, on_gpu))), "GPU"
    return max((attempt.peak_ram_mib for attempt in read_attempts(run.output)), default=NAN), "RAM"
