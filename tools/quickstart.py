#!/usr/bin/env python
"""Complete example: create a synthetic dataset, train on it, draw detections, write a report.

    make quickstart        or        python tools/quickstart.py [--verbose] [KEY VALUE ...]

It trains with the unlabeled images and, to compare, without them. If it was interrupted, the same
command resumes it. Once it has finished, the command shows the results.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from detectron2.config import CfgNode
from tabulate import tabulate

from locreweight.command_line import ConfigArgumentParser, reports_errors
from locreweight.config import load_config
from locreweight.engine.detection_files import PictureWriter
from locreweight.engine.inference import find_inputs
from locreweight.engine.prediction import predict_files
from locreweight.engine.predictor import Predictor
from locreweight.engine.run_folder import SUMMARY_METRICS, RunFolder
from locreweight.engine.shared_burn_in import start_from_checkpoint
from locreweight.run_files import FINAL_CHECKPOINT, LAST_CHECKPOINT, METRICS_FILE
from locreweight.visualization.report import write_report

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "configs/quickstart.yaml"
NUM_PICTURES = 12


@reports_errors
def main() -> None:
    parser = ConfigArgumentParser(description=__doc__)
    parser.add_argument("--verbose", action="store_true", help="print the whole log of training")
    args = parser.parse_args()
    os.chdir(ROOT)  # paths in the config are relative to the repository
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = ["MODEL.DEVICE", device, *args.opts]
    cfg = load_config(CONFIG, options)
    output = Path(cfg.OUTPUT_DIR)
    baseline = output.with_name(f"{output.name}-labeled-only")
    if is_finished(output, cfg) and is_finished(baseline, cfg) and report_of(output).is_file():
        print(f"The quickstart has finished before. To repeat it, remove {output} and {baseline}.")
        print_results(output, baseline)
        return

    print("1/4  creating the dataset: 40 labeled, 500 unlabeled and 200 test images", flush=True)
    sizes = ["--labeled", "40", "--unlabeled", "500", "--val", "200", "--size", "64", "--seed", "0"]
    run_script("datasets/make_synthetic.py", *sizes)

    print(f"2/4  training on {device} with labeled and unlabeled images", flush=True)
    command = ["train_net.py", *(["--verbose"] if args.verbose else [])]
    command += ["--config-file", CONFIG, "--resume"]
    run_script(*command, *options)

    print("3/4  training from the same burn-in with the labeled images only", flush=True)
    share_burn_in(output, baseline, cfg.SEMI.BURN_IN_ITERS)
    labeled_only = ["SEMI.BURN_IN_ITERS", str(cfg.SOLVER.MAX_ITER), "TEST.MONITORED_IMAGES", "0"]
    run_script(*command, *options, *labeled_only, "OUTPUT_DIR", str(baseline))

    print("4/4  drawing detections and writing the report", flush=True)
    files = find_inputs(["datasets/synthetic/val"])[:NUM_PICTURES]
    predict_files(Predictor(output), files, [PictureWriter(output / "detections")])
    write_report([output, baseline], report_of(output), images=200)
    print_results(output, baseline)


def report_of(output: Path) -> Path:
    return output / "report.html"


def is_finished(output: Path, cfg: CfgNode) -> bool:
    """Whether a run has been trained and evaluated to the end, or to an early one."""
    run = RunFolder(output)
    same_end = (run.max_iter, run.patience) == (
        cfg.SOLVER.MAX_ITER,
        cfg.SOLVER.EARLY_STOPPING_PATIENCE,
    )
    is_final = run.final_evaluation is not None
    return same_end and is_final and (output / FINAL_CHECKPOINT).is_file()


def share_burn_in(source: Path, target: Path, burn_in: int) -> None:
    """Let a new run continue from the end of another run's burn-in, which is the same for both."""
    checkpoint = source / f"model_{burn_in - 1:07d}.pth"
    if checkpoint.is_file() and not (target / LAST_CHECKPOINT).is_file():
        start_from_checkpoint(target, checkpoint, source / METRICS_FILE, checkpoint.name)


def print_results(output: Path, baseline: Path) -> None:
    labeled_only = [r._replace(model="labeled images only") for r in RunFolder(baseline).summary()]
    rows = [*labeled_only, *RunFolder(output).summary()]
    table = [[row.model, row.iteration, *row.values] for row in rows]
    headers = ["model", "iterations", *SUMMARY_METRICS]
    print(f"\n{tabulate(table, headers=headers, tablefmt='github', floatfmt='.2f')}\n")
    for name, place in {
        "report": report_of(output),
        "detections": output / "detections",
        "pseudo-labels": output / "panels",
        "checkpoints": f"{output}: model_best.pth, model_final.pth (the teacher is `model`)",
        "curves": f"tensorboard --logdir {output}",
    }.items():
        print(f"{name:15}{place}")
    print("For your own data, see README.md.")


def run_script(*command: str) -> None:
    """Run a Python script. If it fails, exit with its code; it has printed the reason."""
    if code := subprocess.run([sys.executable, *command]).returncode:
        sys.exit(code)


if __name__ == "__main__":
    main()
