"""Read the output folder of a run: config, metrics, evaluations, starts and attempts.

All tools that report on runs read them here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import compress
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import yaml
from tabulate import tabulate

from ..config import CONFIGS_FOLDER, load_config
from ..errors import UsageError
from ..run_files import (
    ANALYSIS_FOLDER,
    CONFIG_FILE,
    LAST_CHECKPOINT,
    METRICS_FILE,
    PANEL_FOLDER,
    is_run_folder,
)
from .detection_analysis import DetectionAnalysis, read_analyses
from .hooks import is_patience_over
from .run_record import RunRecord, read_run_records

BASE_CONFIG = CONFIGS_FOLDER / "Base-LocReweight.yaml"
ATTEMPTS_FILE = "attempts.json"  # in OUTPUT_DIR
# Column -> metric. The threshold is a score, all others are percentages.
SUMMARY_METRICS = {
    **{name: name for name in ("AP", "AP50", "AP75", "F1")},
    "at threshold": "F1-threshold",
}
_SEED_FOLDER = re.compile(r"seed-(\d+)")  # of the runs of a comparison


@dataclass(frozen=True)
class Curve:
    """Values of one metric over the iterations."""

    iterations: list[int]
    values: list[float]


class SummaryRow(NamedTuple):
    """Metrics of one model of a run after a number of iterations; NaN for unknown ones."""

    run: str
    model: str
    iteration: int
    values: tuple[float, ...]  # of SUMMARY_METRICS


@dataclass(frozen=True)
class Attempt:
    """One start of a run by ``tools/compare.py``.

    Attributes:
        seconds: duration.
        exit_code: of the process; 0 for success.
        peak_ram_mib: largest resident memory of one of its processes, in MiB.
    """

    seconds: float
    exit_code: int
    peak_ram_mib: float


class RunFolder:
    """The ``OUTPUT_DIR`` of a run. Any part of it may be missing.

    Files are read once, when they are first needed. To follow a running training, create a new
    object.
    """

    def __init__(self, path: Path, name: str = "") -> None:
        """
        Args:
            path: the ``OUTPUT_DIR``.
            name: name of the run in tables and figures. Default: the name of the folder.
        """
        self.path = path
        self.name = name or path.name

    @cached_property
    def config(self) -> dict[str, Any]:
        """Dotted config key -> value, from ``config.yaml``; empty if the file is missing or empty.

        Raises:
            UsageError: if the file is not YAML.
        """
        file = self.path / CONFIG_FILE
        if not file.is_file():
            return {}
        try:
            return flatten_config(yaml.safe_load(file.read_text()) or {})
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read the config file {file}: {error}") from error

    @cached_property
    def metrics(self) -> list[dict[str, float]]:
        """The records of ``metrics.json`` in the order in which they were written."""
        return read_metrics(self.path)

    @cached_property
    def _records(self) -> list[dict[str, float]]:
        """The metrics. Results of the first of several test sets are named as those of a single
        one, such as ``bbox/AP``.
        """
        first, *others = self.config.get("DATASETS.TEST") or [""]
        if not others:
            return self.metrics
        return [
            {name.replace(f"{first}/", "", 1): value for name, value in record.items()}
            for record in self.metrics
        ]

    @cached_property
    def starts(self) -> list[RunRecord]:
        """The start of the run and each resume, oldest first."""
        return read_run_records(self.path)

    @cached_property
    def attempts(self) -> list[Attempt]:
        """The starts by ``tools/compare.py``, oldest first."""
        return read_attempts(self.path)

    @property
    def panels(self) -> list[Path]:
        """Pictures of pseudo-labels, oldest first."""
        return sorted((self.path / PANEL_FOLDER).glob("iter_*.jpg"))

    @property
    def before_and_after(self) -> list[tuple[int, Path]]:
        """Iteration and picture of the teacher at the end of burn-in and of training."""
        files = sorted((self.path / PANEL_FOLDER).glob("teacher_*.jpg"))
        return [(_iteration_of(file), file) for file in files]

    @cached_property
    def last_analysis(self) -> tuple[int, dict[str, DetectionAnalysis]]:
        """Iteration of the teacher's last evaluation, 0 without, and analysis by test set.

        Raises:
            UsageError: if the file is damaged.
        """
        files = sorted((self.path / ANALYSIS_FOLDER).glob("iter_*.json"))
        return (_iteration_of(files[-1]), read_analyses(files[-1])) if files else (0, {})

    @property
    def has_checkpoint(self) -> bool:
        return (self.path / LAST_CHECKPOINT).is_file()

    @property
    def max_iter(self) -> int:
        """Iterations of the whole run; 0 if unknown."""
        return int(self.config.get("SOLVER.MAX_ITER", 0))

    @property
    def burn_in(self) -> int:
        """Iterations on labeled images only, at most all iterations; 0 if unknown."""
        return min(int(self.config.get("SEMI.BURN_IN_ITERS", 0)), self.max_iter)

    @property
    def patience(self) -> int:
        """``SOLVER.EARLY_STOPPING_PATIENCE``; 0 if unknown."""
        return int(self.config.get("SOLVER.EARLY_STOPPING_PATIENCE", 0))

    @property
    def iterations_done(self) -> int:
        """Number of iterations in ``metrics.json``."""
        done = max((int(record["iteration"]) + 1 for record in self.metrics), default=0)
        return min(done, self.max_iter or done)

    @property
    def evaluations(self) -> dict[int, dict[str, float]]:
        """Number of completed iterations -> metrics of the evaluation (``bbox/AP``, ...).

        With several test sets, these are the metrics of the first one. Empty without
        ``config.yaml``, which is needed to recognize the last evaluation.
        """
        if not self.max_iter:
            return {}
        # Iterations are counted from 0. Detectron2's hooks log the last evaluation as MAX_ITER.
        return {
            min(int(record["iteration"]) + 1, self.max_iter): record
            for record in self._records
            if "bbox/AP" in record
        }

    @property
    def ended_early(self) -> bool:
        """Whether early stopping has ended the training."""
        aps = {done: record["bbox/AP"] for done, record in self.evaluations.items()}
        known = {done: ap for done, ap in aps.items() if not math.isnan(ap)}
        done = max(aps, default=0)
        return 0 < done < self.max_iter and is_patience_over(
            done,
            max(known, key=known.__getitem__, default=0),
            patience=self.patience,
            eval_period=self.config.get("TEST.EVAL_PERIOD", 0),
            burn_in=self.burn_in if self.burn_in < self.max_iter else 0,
        )

    @property
    def final_evaluation(self) -> dict[str, float] | None:
        """The last evaluation of a training that has reached its end; None before."""
        done = max(self.evaluations, default=0)
        is_last = done == self.max_iter or self.ended_early
        return self.evaluations[done] if done and is_last else None

    def curve(self, metric: str) -> Curve:
        """Return all values of a metric, the last one of iterations that were measured twice."""
        values = {int(m["iteration"]): m[metric] for m in self._records if metric in m}
        return Curve(sorted(values), [values[iteration] for iteration in sorted(values)])

    def last_record_with(self, metric: str) -> dict[str, float]:
        """Return the last record that contains a metric; empty if there is none."""
        return next((record for record in reversed(self.metrics) if metric in record), {})

    def summary(self) -> list[SummaryRow]:
        """Return the teacher at the end of burn-in, the final student and the final teacher.

        Models that were not evaluated are left out. A run that has not been evaluated after
        burn-in has one row, its last evaluated model.
        """
        evaluations = self.evaluations
        if not evaluations:
            return []
        last = max(evaluations)
        if self.burn_in >= self.max_iter:
            return [self._summary_row("supervised", last)]
        if last < self.burn_in:
            return [self._summary_row("during burn-in", last)]
        rows = []
        if self.burn_in in evaluations:
            rows.append(self._summary_row("teacher, end of burn-in", self.burn_in))
        if last == self.burn_in:
            return rows
        rows.append(self._summary_row("final student", last, "student/"))
        rows.append(self._summary_row("final teacher", last))
        return rows

    def _summary_row(self, model: str, iteration: int, prefix: str = "") -> SummaryRow:
        record = self.evaluations[iteration]
        names = (f"{prefix}bbox/{metric}" for metric in SUMMARY_METRICS.values())
        values = tuple(record.get(name, math.nan) for name in names)
        return SummaryRow(self.name, model, iteration, values)

    def differences_from_base(self) -> list[tuple[str, str, str]]:
        """Return (key, value in ``Base-LocReweight.yaml``, value here) where the two differ."""
        base = flatten_config(yaml.safe_load(load_config(str(BASE_CONFIG), []).dump()))
        return [
            (key, _format_value(base, key), _format_value(self.config, key))
            for key in sorted(self.config)
            if key not in base or base[key] != self.config[key]
            if key != "OUTPUT_DIR"
        ]


def open_run(path: Path, name: str = "") -> RunFolder:
    """Open the output folder of a run.

    Raises:
        UsageError: if the folder does not exist or contains none of the files of a run.
    """
    if not path.is_dir():
        raise UsageError(f"the folder {path} does not exist: name the OUTPUT_DIR of a run")
    run = RunFolder(path, name)
    if not (run.config or run.metrics or run.starts or run.has_checkpoint):
        raise UsageError(
            f"{path} is not the OUTPUT_DIR of a run: no config.yaml, no {METRICS_FILE}"
        )
    return run


@dataclass(frozen=True)
class RunGroup:
    """Runs that differ in their seeds only, or a single run."""

    name: str
    runs: list[RunFolder]


def open_runs(paths: Sequence[Path]) -> list[RunFolder]:
    """Open several runs under unique names.

    Args:
        paths: the ``OUTPUT_DIR`` of runs, or folders that ``tools/compare.py`` has written.

    Raises:
        UsageError: as :func:`open_run`.
    """
    paths = list(dict.fromkeys(run for path in paths for run in _runs_in(path)))
    return [open_run(path, name) for path, name in zip(paths, unique_names(paths), strict=True)]


def _runs_in(folder: Path) -> list[Path]:
    """The runs of a comparison; the folder itself if it is not one."""
    files = folder.glob("*/seed-*")
    runs = [path for path in files if is_run_folder([file.name for file in path.glob("*")])]
    return sorted(runs, key=lambda path: (path.parent, _seed_of(path))) or [folder]


def _seed_of(path: Path) -> int:
    match = _SEED_FOLDER.fullmatch(path.name)
    return int(match[1]) if match else -1


def group_seeds(runs: Sequence[RunFolder]) -> list[RunGroup]:
    """Group the runs that ``tools/compare.py`` has trained with several seeds."""
    members: dict[Path, list[RunFolder]] = {}
    for run in runs:
        is_seed = _seed_of(run.path) >= 0
        members.setdefault(run.path.resolve().parent if is_seed else run.path, []).append(run)
    return [
        RunGroup(name, group)
        for name, group in zip(unique_names(list(members)), members.values(), strict=True)
    ]


def describe_test_sets(runs: Sequence[RunFolder]) -> str:
    """A warning if not all runs have the same test sets; otherwise empty."""
    names: dict[str, list[str]] = {}
    for run in runs:
        if "DATASETS.TEST" in run.config:
            names.setdefault(_format_value(run.config, "DATASETS.TEST"), []).append(run.name)
    if len(names) < 2:
        return ""
    sets = "; ".join(f"{', '.join(members)}: {test}" for test, members in names.items())
    return f"the runs have different test sets, so their results cannot be compared. {sets}"


def unique_names(paths: Sequence[Path]) -> list[str]:
    """Return the last part of each path, with as many parent folders as are needed to differ."""
    if not paths:
        return []
    parts = [(p.with_suffix("") if p.suffix == ".pth" else p).resolve().parts for p in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def differing_keys(runs: Sequence[RunFolder]) -> list[tuple[str, list[str]]]:
    """Return (key, its value in each run) where the configs of the runs differ."""
    keys = sorted({key for run in runs for key in run.config} - {"OUTPUT_DIR"})
    rows = [(key, [_format_value(run.config, key) for run in runs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


@dataclass(frozen=True)
class Summary:
    """The summaries of several runs as tables.

    Attributes:
        headers: run, model, iterations and the metrics that at least one row has.
        means: mean and standard deviation over the seeds, see :func:`_mean_rows`.
        rows: of all runs.
    """

    headers: list[str]
    means: list[list[str]]
    rows: list[list[str]]

    @classmethod
    def of(cls, runs: Sequence[RunFolder]) -> Summary:
        headers = ["run", "model", "iterations", *SUMMARY_METRICS]
        means = _mean_rows(runs)
        rows = [
            [r.run, r.model, str(r.iteration), *map(format_metric, r.values)]
            for run in runs
            for r in run.summary()
        ]
        used = [any(row[i] for row in [*means, *rows]) for i in range(len(headers))]
        return cls(
            list(compress(headers, used)),
            [list(compress(row, used)) for row in means],
            [list(compress(row, used)) for row in rows],
        )


def summary_table(runs: Sequence[RunFolder]) -> str:
    """Return the summary of all runs as tables in Markdown: means over seeds, and all runs."""
    summary = Summary.of(runs)
    align = ("left", "left", *["right"] * (len(summary.headers) - 2))
    tables = [
        tabulate(table, summary.headers, tablefmt="github", disable_numparse=True, colalign=align)
        for table in (summary.means, summary.rows)
        if table
    ]
    return "\n\n".join(tables)


def _mean_rows(runs: Sequence[RunFolder]) -> list[list[str]]:
    """Return the rows of the summary with mean and standard deviation over the seeds.

    Only rows that all seeds of a group have. Groups of a single run are left out.
    """
    table = []
    for group in group_seeds(runs):
        if len(group.runs) < 2:
            continue
        rows = [{(r.model, r.iteration): r.values for r in run.summary()} for run in group.runs]
        for model, iteration in rows[0]:
            if all((model, iteration) in other for other in rows):
                columns = zip(*(other[model, iteration] for other in rows), strict=True)
                name = f"{group.name}, {len(rows)} seeds"
                table.append([name, model, str(iteration), *map(_spread, columns)])
    return table


def _spread(values: Sequence[float]) -> str:
    if any(map(math.isnan, values)):
        return ""
    return f"{mean(values):.2f} ± {stdev(values):.2f}"


def format_metric(value: float) -> str:
    """Format a metric with two digits; empty for NaN."""
    return "" if math.isnan(value) else f"{value:.2f}"


def flatten_config(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> value of all keys below a node of a config."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, dict) and value:
            flat |= flatten_config(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def read_metrics(output: Path) -> list[dict[str, float]]:
    """Return the records of ``metrics.json`` in an ``OUTPUT_DIR``; none if the file is missing."""
    file = output / METRICS_FILE
    records = []
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:  # the last line of a run that is being written or was killed
            continue
    return records


def read_attempts(output: Path) -> list[Attempt]:
    """Return the attempts in an ``OUTPUT_DIR``, oldest first; none if there is no record."""
    file = output / ATTEMPTS_FILE
    records = json.loads(file.read_text()) if file.is_file() else []
    names = {field.name for field in fields(Attempt)}  # earlier versions wrote more fields
    return [Attempt(**{k: v for k, v in record.items() if k in names}) for record in records]


def _iteration_of(file: Path) -> int:
    return int(file.stem.rpartition("_")[2])


def _format_value(config: dict[str, Any], key: str) -> str:
    return json.dumps(config[key]) if key in config else ""
