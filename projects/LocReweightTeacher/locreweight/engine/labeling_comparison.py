"""Compare labeling suggested images with labeling as many random ones, on annotated data.

For each seed, a first model is trained with a part of the labels. Then labels are added: of images
that this model suggests, or of random ones. A new model is trained with each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from tabulate import tabulate

from ..config import find_method_file
from ..data.datasets.splits import split_annotated, write_chosen_split
from ..data.training_sets import register_datasets
from ..errors import UsageError
from .comparison import check_not_set, check_run, run_all
from .label_suggestion import suggest
from .prediction import input_files
from .predictor import Predictor
from .run_queue import Run

# Keys that the comparison sets itself, with the flags of the command line.
_FLAGS = {
    "SEED": "--seeds",
    "DATASETS.SPLIT_SEED": "--seeds",
    "DATASETS.LABELED_PERCENT": "--percent and --add",
    "OUTPUT_DIR": "--output",
}


class LabelingRun(Run):
    """A run that is called after its labels in messages."""

    @property
    def row(self) -> str:
        return f"{self.output.parent.name} labels"


@dataclass(frozen=True)
class LabelingPlan:
    """What is compared.

    Attributes:
        config: config file, whose ``DATASETS.TRAIN`` is annotated.
        output: folder for the runs and splits.
        percent: percentage of the labels that the first model is trained with.
        add: percentage that is added.
        method: name or file of the method; empty for the config's own method.
        options: ``KEY VALUE`` pairs for all runs.
        num_gpus: number of GPUs per run.
    """

    config: Path
    output: Path
    percent: float = 5.0
    add: float = 5.0
    method: str = ""
    options: tuple[str, ...] = ()
    num_gpus: int = 1

    def first(self, seed: int) -> Run:
        """The run with the first labels."""
        return self._run("first", seed, self.percent)

    def random(self, seed: int) -> Run:
        """The run with random labels added. Splits of one seed are nested."""
        return self._run("random", seed, self.percent + self.add)

    def suggested(self, seed: int) -> Run:
        """The run with the labels of suggested images added."""
        split = ("DATASETS.SPLIT_FILE", str(self.split_file(seed)))
        return self._run("suggested", seed, self.percent + self.add, split)

    def split_file(self, seed: int) -> Path:
        """Lists the labeled images of :meth:`suggested`."""
        return self.output / "splits" / f"seed-{seed}.json"

    def _run(self, name: str, seed: int, percent: float, options: tuple[str, ...] = ()) -> Run:
        return LabelingRun(
            config=self.config,
            method=find_method_file(self.method) if self.method else None,
            seed=seed,
            output=self.output / name / f"seed-{seed}",
            options=(*self.options, "DATASETS.LABELED_PERCENT", str(float(percent)), *options),
            num_gpus=self.num_gpus,
        )


@dataclass(frozen=True)
class LabelingResult:
    """Result of one run.

    Attributes:
        labels: "first", "random" or "suggested".
        seed: seed of the run.
        images: number of labeled images.
        boxes: number of boxes in them, without crowd regions.
        ap: AP of the final teacher, in percent.
    """

    labels: str
    seed: int
    images: int
    boxes: int
    ap: float


def compare_labeling(
    plan: LabelingPlan, seeds: Sequence[int], parallel: int | None
) -> list[LabelingResult]:
    """Train all models, or resume; finished parts are not repeated.

    Args:
        plan: what is compared.
        seeds: the comparison is repeated with each seed. Repeated seeds count once.
        parallel: number of runs at a time; None for as many as the GPUs allow, or 1 without GPUs.

    Raises:
        UsageError: if a setting is invalid, or a run failed.
    """
    if not (plan.percent > 0 and plan.add > 0 and plan.percent + plan.add <= 100):
        raise UsageError("the two percentages must be positive, and together at most 100")
    check_not_set(plan.options, _FLAGS)
    seeds = list(dict.fromkeys(seeds))
    for seed in seeds:
        _check_split(plan, plan.random(seed).cfg)
        check_run(plan.first(seed))
        check_run(plan.random(seed))
    _train([plan.first(seed) for seed in seeds], parallel)
    for seed in seeds:
        if not plan.split_file(seed).is_file():
            write_suggested_split(plan, seed)
    _train([run(seed) for seed in seeds for run in (plan.random, plan.suggested)], parallel)
    kinds = {"first": plan.first, "random": plan.random, "suggested": plan.suggested}
    return [_result(name, run(seed)) for seed in seeds for name, run in kinds.items()]


def write_suggested_split(plan: LabelingPlan, seed: int) -> None:
    """Write the split with the first labels and those of the suggested images.

    The last model of the first run makes the suggestions. The best one would be chosen by the test
    set.
    """
    cfg = plan.first(seed).cfg
    annotated = _annotated(plan.first(seed))
    positions = {
        record["file_name"]: i for i, record in enumerate(chain.from_iterable(annotated.values()))
    }
    labeled, rest = split_annotated(cfg, annotated)
    count = len(split_annotated(plan.random(seed).cfg, annotated)[0]) - len(labeled)
    detector = Predictor(plan.first(seed).output, device=cfg.MODEL.DEVICE, last=True)
    unreadable: list[str] = []
    suggestions = suggest(
        detector, input_files(rest), input_files(labeled), count, unreadable=unreadable
    )
    if unreadable:
        raise UsageError(f"some images cannot be read: {'; '.join(unreadable)}")
    by_path = {str(Path(name).absolute()): i for name, i in positions.items()}
    chosen = [by_path[str(suggestion.file.path)] for suggestion in suggestions]
    chosen += [positions[record["file_name"]] for record in labeled]
    write_chosen_split(plan.split_file(seed), annotated, chosen, plan.percent + plan.add, seed)


def labeling_table(results: Sequence[LabelingResult]) -> str:
    """Return a table in Markdown: mean and standard deviation of each kind of labels."""
    rows = []
    for labels in dict.fromkeys(result.labels for result in results):
        group = [result for result in results if result.labels == labels]
        boxes = np.mean([result.boxes for result in group])
        rows.append([labels, group[0].images, f"{boxes:.1f}", _spread([r.ap for r in group])])
    ap = {(result.labels, result.seed): result.ap for result in results}
    gains = [
        ap["suggested", seed] - ap["random", seed] for labels, seed in ap if labels == "random"
    ]
    rows.append(["suggested - random", "", "", _spread(gains)])
    headers = ["labels", "images", "boxes", "AP"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def _check_split(plan: LabelingPlan, cfg: CfgNode) -> None:
    if cfg.DATASETS.SPLIT_FILE:
        raise UsageError(
            "DATASETS.SPLIT_FILE is set, but this comparison draws its splits with --percent, "
            "--add and --seeds: remove it, or add DATASETS.SPLIT_FILE \"''\" to the command"
        )
    learns_unlabeled = cfg.SEMI.BURN_IN_ITERS < cfg.SOLVER.MAX_ITER
    if learns_unlabeled and not cfg.DATASETS.UNLABELED and plan.percent + plan.add >= 100:
        raise UsageError(
            "--percent and --add leave no unlabeled images: use less than 100 together, or set "
            "DATASETS.UNLABELED"
        )


def _train(runs: list[Run], parallel: int | None) -> None:
    failed = run_all(runs, parallel, lambda: None)
    if failed:
        raise UsageError(f"{len(failed)} runs failed: {'; '.join(failed)}")


def _annotated(run: Run) -> dict[str, list[dict]]:
    register_datasets(run.cfg)
    return {name: list(DatasetCatalog.get(name)) for name in run.cfg.DATASETS.TRAIN}


def _result(labels: str, run: Run) -> LabelingResult:
    labeled, _ = split_annotated(run.cfg, _annotated(run))
    boxes = sum(not a.get("iscrowd", 0) for record in labeled for a in record["annotations"])
    return LabelingResult(labels, run.seed, len(labeled), boxes, run.final_ap)


def _spread(values: Sequence[float]) -> str:
    deviation = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{deviation}"
