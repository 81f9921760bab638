"""Say in a sentence what came out of a run or a comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean

from ..engine.run_folder import RunFolder, RunGroup, describe_test_sets

AP = "bbox/AP"


def describe_run(run: RunFolder) -> str:
    """Return a sentence on the AP of a run and how it changed after burn-in."""
    evaluations = run.evaluations
    if not evaluations:
        return "Nothing has been evaluated yet."
    last = max(evaluations)
    teacher, student = (_ap(evaluations[last], prefix) for prefix in ("", "student/"))
    progress = f"After {last} iterations"
    if last < run.max_iter:
        early = " (early stopping)" if run.ended_early else ""
        progress = f"After {last} of {run.max_iter} iterations{early}"
    if last <= run.burn_in:
        return f"{progress}, on labeled images only, the model has an AP of {teacher:.1f}."
    if run.burn_in not in evaluations:
        return f"{progress}, the teacher has an AP of {teacher:.1f} and the student {student:.1f}."
    before = _ap(evaluations[run.burn_in])
    return (
        f"{progress}, the teacher has an AP of {teacher:.1f} and the student {student:.1f}. At the "
        f"end of burn-in, iteration {run.burn_in}, the AP was {before:.1f}: a change of "
        f"{teacher - before:+.1f}. "
        "How much of the change comes from the unlabeled images shows in a comparison with "
        "--method supervised at the same number of iterations."
    )


def describe_comparison(groups: Sequence[RunGroup]) -> str:
    """Return a sentence on which runs are best, and on the gain over labeled images only."""
    if describe_test_sets([run for group in groups for run in group.runs]):
        return "The runs have different test sets, so their results cannot be compared."
    final = {group.name: ap for group in groups if not math.isnan(ap := _final_ap(group))}
    if len(final) < 2:
        return "There is nothing to compare yet: fewer than two are evaluated to the end."
    best = max(final, key=final.__getitem__)
    worst = min(final, key=final.__getitem__)
    text = f"{best} has the highest final AP, {final[best]:.1f}, and {worst} the lowest, "
    text += f"{final[worst]:.1f}."
    supervised = [g.name for g in groups if g.name in final and _is_supervised(g)]
    others = [name for name in final if name not in supervised]
    if supervised and others:
        base = max(supervised, key=final.__getitem__)
        top = max(others, key=final.__getitem__)
        text += f" With the unlabeled images, {top} has {final[top] - final[base]:+.1f} AP against "
        text += f"{base}, which is trained on labeled images only."
    if any(len(group.runs) > 1 for group in groups):
        text += " These are means over the seeds."
    return text


def _final_ap(group: RunGroup) -> float:
    """Mean AP of the finished runs; NaN if none is finished."""
    final = [run.final_evaluation for run in group.runs]
    values = [_ap(record) for record in final if record]
    return mean(values) if values else math.nan


def _is_supervised(group: RunGroup) -> bool:
    return all(0 < run.max_iter <= run.burn_in for run in group.runs)


def _ap(record: dict[str, float], prefix: str = "") -> float:
    value = record.get(prefix + AP, math.nan)
    return 0.0 if math.isnan(value) else value  # Detectron2 writes NaN without detections
