"""What training left in an OUTPUT_DIR, read for a report; any part of it may be missing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from summarize import Result, results_of

from ..config import load_config
from ..errors import UsageError
from .panels import PANEL_FOLDER
from .run_record import RunRecord, read_run_records

BASE = Path(__file__).resolve().parents[4] / "configs/Base-LocReweight.yaml"


@dataclass(frozen=True)
class Curve:
    """One number over the iterations."""

    iterations: list[int]
    values: list[float]


@dataclass(frozen=True)
class RunFolder:
    """One run.

    Attributes:
        name: what it is called beside others.
        path: its ``OUTPUT_DIR``.
        config: all keys, dotted, and their values as YAML; empty if ``config.yaml`` is missing.
        metrics: iteration -> what was measured then, by name.
        starts: how it was started, and each time it was resumed.
        panels: pictures of pseudo-labels, oldest first.
    """

    name: str
    path: Path
    config: dict[str, str]
    metrics: dict[int, dict[str, float]]
    starts: list[RunRecord]
    panels: list[Path]

    @property
    def burn_in(self) -> int:
        """Iterations on labeled images only, at most all of them; 0 if not known."""
        end = int(self.config.get("SOLVER.MAX_ITER", 0))
        return min(int(self.config.get("SEMI.BURN_IN_ITERS", 0)), end)

    @property
    def results(self) -> list[Result]:
        """The rows of ``summarize.py``; none before the first evaluation."""
        known = self.config and any("bbox/AP" in record for record in self.metrics.values())
        found = results_of(self.path) if known else []
        return [result._replace(run=self.name) for result in found]

    @property
    def has_checkpoint(self) -> bool:
        return (self.path / "last_checkpoint").is_file()

    def curve(self, name: str) -> Curve:
        """All values of one number; without any, an empty curve."""
        points = sorted((i, m[name]) for i, m in self.metrics.items() if name in m)
        return Curve([i for i, _ in points], [value for _, value in points])

    def differences(self) -> list[tuple[str, str, str]]:
        """(key, value in the base config, value here) where the two differ."""
        base = flat_config(BASE)
        return [
            (key, base.get(key, ""), value)
            for key, value in sorted(self.config.items())
            if base.get(key, "") != value and key != "OUTPUT_DIR"
        ]


def read_runs(paths: Sequence[Path]) -> list[RunFolder]:
    """Several of :func:`read_run`, under names that tell them apart."""
    return [read_run(path, name) for path, name in zip(paths, unique_names(paths), strict=True)]


def read_run(path: Path, name: str) -> RunFolder:
    """Read what there is.

    Args:
        path: its ``OUTPUT_DIR``.
        name: what to call it.

    Raises:
        UsageError: if the folder does not exist, or has nothing that training writes.
    """
    if not path.is_dir():
        raise UsageError(f"the folder {path} does not exist: name the OUTPUT_DIR of a run")
    config_file = path / "config.yaml"
    run = RunFolder(
        name=name,
        path=path,
        config=flat_config(config_file) if config_file.is_file() else {},
        metrics=_read_metrics(path / "metrics.json"),
        starts=read_run_records(path),
        panels=sorted((path / PANEL_FOLDER).glob("iter_*.jpg")),
    )
    if not (run.config or run.metrics or run.starts or run.has_checkpoint):
        raise UsageError(f"{path} is not the OUTPUT_DIR of a run: no config.yaml, no metrics.json")
    return run


def unique_names(paths: Sequence[Path]) -> list[str]:
    """What tells files or folders apart: the last part, and as many before it as are needed."""
    parts = [(p.with_suffix("") if p.suffix == ".pth" else p).resolve().parts for p in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def flat_config(file: Path) -> dict[str, str]:
    """Dotted key -> value as YAML in one line."""
    return dict(_flatten(yaml.safe_load(load_config(str(file), []).dump()), ""))


def differing_keys(runs: Sequence[RunFolder]) -> list[tuple[str, list[str]]]:
    """(key, its value in each run) where the runs do not agree."""
    keys = sorted({key for run in runs for key in run.config} - {"OUTPUT_DIR"})
    rows = [(key, [run.config.get(key, "") for run in runs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _flatten(node: dict[str, Any], prefix: str) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for key, value in node.items():
        if isinstance(value, dict) and value:
            pairs += _flatten(value, f"{prefix}{key}.")
        else:
            pairs.append((prefix + key, json.dumps(value)))
    return pairs


def _read_metrics(file: Path) -> dict[int, dict[str, float]]:
    """A resumed run may have measured an iteration twice: what was measured later holds."""
    metrics: dict[int, dict[str, float]] = {}
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # the last line of a run that is being written, or was killed
            continue
        metrics.setdefault(record.pop("iteration"), {}).update(record)
    return metrics
