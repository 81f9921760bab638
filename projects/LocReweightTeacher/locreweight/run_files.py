"""Names of the files in an ``OUTPUT_DIR``, and how the folder of a run is recognized."""

from __future__ import annotations

import re
from collections.abc import Collection
from fnmatch import fnmatchcase

CONFIG_FILE = "config.yaml"
LOCK_FILE = ".lock"
TOKEN_PREFIX = ".seen-"  # of a file that exists only while a start checks that all hosts see it
METRICS_FILE = "metrics.json"
RUN_FILE = "run.json"
LAST_CHECKPOINT = "last_checkpoint"
BEST_CHECKPOINT = "model_best.pth"
FINAL_CHECKPOINT = "model_final.pth"
SKIPPED_STEPS_FILE = "skipped_steps.jsonl"
EVALUATION_FOLDER = "evaluation"  # of --eval-only
PANEL_FOLDER = "panels"
ANALYSIS_FOLDER = "analysis"  # of the detections of each evaluation, see detection_analysis
ANALYSIS_FILE = "analysis.json"  # of --eval-only, in its folder inference
CACHE_FOLDER = "dataset_cache"

# Together with the config, each of these shows that a folder was written by a training.
_EVIDENCE = {LOCK_FILE, METRICS_FILE, RUN_FILE, LAST_CHECKPOINT}
_CHECKPOINT = re.compile(r"model_(best|final|resume|\d{7,})\.pth")
# What training, evaluation and the tools write into an OUTPUT_DIR.
_WRITTEN_HERE = (
    CONFIG_FILE,
    LOCK_FILE,
    f"{TOKEN_PREFIX}*",
    METRICS_FILE,
    RUN_FILE,
    LAST_CHECKPOINT,
    SKIPPED_STEPS_FILE,
    EVALUATION_FOLDER,
    PANEL_FOLDER,
    ANALYSIS_FOLDER,
    CACHE_FOLDER,
    "inference",
    "log.txt*",
    "model_*.pth",
    "*.partial",
    "events.out.tfevents.*",
    "attempts.json",
    "console.txt",
    "detections",
    "report.html",
)


def is_run_folder(names: Collection[str]) -> bool:
    """Whether a folder with these files is the ``OUTPUT_DIR`` of a run, whatever it is called."""
    return CONFIG_FILE in names and not _EVIDENCE.isdisjoint(names)


def is_checkpoint_of_run(name: str) -> bool:
    """Whether training writes checkpoints of this name."""
    return _CHECKPOINT.fullmatch(name) is not None


def is_written_by_run(name: str) -> bool:
    """Whether a file or folder of this name in an ``OUTPUT_DIR`` was written by this project."""
    return any(fnmatchcase(name, pattern) for pattern in _WRITTEN_HERE)
