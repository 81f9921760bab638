#!/usr/bin/env python
"""Print the results of runs as one table: where the teacher began, and what became of both models.

python tools/summarize.py output/quickstart [output/another ...]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import yaml
from tabulate import tabulate

METRICS = ("AP", "AP50", "AP75")


class Result(NamedTuple):
    """AP, AP50 and AP75 of one model at one time, in percent."""

    run: str
    model: str
    iteration: int
    values: tuple[float, ...]


def results_of(run: Path) -> list[Result]:
    """The teacher at the end of burn-in, the final student and the final teacher of a run.

    Args:
        run: its ``OUTPUT_DIR``.

    Returns:
        those of the three that were evaluated; of a run without mutual learning the final one only.

    Raises:
        FileNotFoundError: if the folder is not that of a run.
    """
    burn_in = config_of(run)["SEMI"]["BURN_IN_ITERS"]
    evaluations = evaluations_of(run)
    if not evaluations:
        return []
    last = max(evaluations)
    if last <= burn_in:
        return [_result(run, "supervised", last, evaluations[last], "")]
    results = []
    if burn_in in evaluations:
        results.append(_result(run, "teacher, end of burn-in", burn_in, evaluations[burn_in], ""))
    results.append(_result(run, "final student", last, evaluations[last], "student/"))
    results.append(_result(run, "final teacher", last, evaluations[last], ""))
    return results


def config_of(run: Path) -> dict:
    """The effective config of a run."""
    return yaml.safe_load((run / "config.yaml").read_text())


def evaluations_of(run: Path) -> dict[int, dict[str, float]]:
    """Number of iterations done -> what was measured then, by name (``bbox/AP``, ...).

    Raises:
        FileNotFoundError: if the folder is not that of a run.
    """
    end = config_of(run)["SOLVER"]["MAX_ITER"]
    # Iterations are counted from 0; Detectron2's own hooks log the last one as the next.
    return {
        min(record["iteration"] + 1, end): record
        for record in metrics_of(run)
        if "bbox/AP" in record
    }


def metrics_of(run: Path) -> list[dict[str, float]]:
    """The records of ``metrics.json``, but for a last one that a run was stopped in writing."""
    lines = (run / "metrics.json").read_text().splitlines()
    if lines and not lines[-1].endswith("}"):
        lines.pop()
    return [json.loads(line) for line in lines]


def table(results: list[Result]) -> str:
    """The results as a table in Markdown."""
    rows = [[r.run, r.model, r.iteration, *r.values] for r in results]
    headers = ["run", "model", "iterations", *METRICS]
    return tabulate(rows, headers=headers, tablefmt="github", floatfmt=".2f")


def _result(run: Path, model: str, iteration: int, record: dict, prefix: str) -> Result:
    values = tuple(record[f"{prefix}bbox/{metric}"] for metric in METRICS)
    return Result(run.name, model, iteration, values)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="OUTPUT_DIR of each run")
    try:
        results = [result for run in parser.parse_args().runs for result in results_of(run)]
    except FileNotFoundError as error:
        sys.exit(f"error: {error.filename} does not exist: is this the OUTPUT_DIR of a run?")
    print(table(results))


if __name__ == "__main__":
    main()
