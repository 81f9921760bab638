#!/usr/bin/env python
"""Complete example: create a synthetic dataset, train on it, draw detections, write a report.

    make quickstart
    python tools/quickstart.py [--verbose] [--method NAME] [KEY VALUE ...]  # the same, with options

It trains with the unlabeled images and, to compare, without them; after burn-in, both trainings run
at the same time. If it was interrupted, the same command resumes it. Once it has finished, the
command shows the results.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
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
from locreweight.engine.run_queue import CONSOLE_FILE
from locreweight.engine.shared_burn_in import checkpoint_of_burn_in, start_from_burn_in
from locreweight.run_files import FINAL_CHECKPOINT, LAST_CHECKPOINT
from locreweight.visualization.report import write_report

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "configs/quickstart.yaml"
SETTINGS = ["SOLVER.MAX_ITER", "700"]  # a little shorter, to take less than 8 minutes on two cores
NUM_PICTURES = 12


@reports_errors
def main() -> None:
    parser = ConfigArgumentParser(description=__doc__)
    parser.add_argument("--verbose", action="store_true", help="print the whole log of training")
    parser.add_argument(
        "--method", default="", metavar="NAME", help="a method of configs/methods, or a file"
    )
    args = parser.parse_args()
    os.chdir(ROOT)  # paths in the config are relative to the repository
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = [*SETTINGS, "MODEL.DEVICE", device, *args.opts]
    cfg = load_config(CONFIG, options, args.method)
    output = Path(cfg.OUTPUT_DIR)
    baseline = output.with_name(f"{output.name}-labeled-only")
    if is_finished(output, cfg) and is_finished(baseline, cfg) and report_of(output).is_file():
        print(f"The quickstart has finished before. To repeat it, remove {output} and {baseline}.")
        print_results(output, baseline)
        return

    print("1/3  creating the dataset: 40 labeled, 500 unlabeled and 200 test images", flush=True)
    sizes = ["--labeled", "40", "--unlabeled", "500", "--val", "200", "--size", "64", "--seed", "0"]
    run_script("datasets/make_synthetic.py", *sizes)

    print(
        f"2/3  training on {device} with labeled and unlabeled images and, at the same time, with "
        "the labeled images only",
        flush=True,
    )
    command = ["train_net.py", *(["--verbose"] if args.verbose else [])]
    command += ["--method", args.method] if args.method else []
    command += ["--config-file", CONFIG, "--resume", *options]
    labeled_only = ["SEMI.BURN_IN_ITERS", str(cfg.SOLVER.MAX_ITER), "TEST.MONITORED_IMAGES", "0"]
    labeled_only += ["OUTPUT_DIR", str(baseline)]
    train_both(command, [*command, *labeled_only], output, baseline, cfg.SEMI.BURN_IN_ITERS)

    print("3/3  drawing detections and writing the report", flush=True)
    files = find_inputs(["datasets/synthetic/val"])[:NUM_PICTURES]
    predict_files(Predictor(output), files, [PictureWriter(output / "detections")])
    write_report([output, baseline], report_of(output), images=100)
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


def train_both(
    command: list[str], baseline_command: list[str], output: Path, baseline: Path, burn_in: int
) -> None:
    """Train with the unlabeled images and, as soon as burn-in has ended, also without them.

    The baseline prints to a file.
    """
    # Two processes with half of the cores each are faster than one process with all of them.
    threads = str(max(len(os.sched_getaffinity(0)) // 2, 1))
    env = {"OMP_NUM_THREADS": threads} | os.environ
    processes = [subprocess.Popen([sys.executable, *command], env=env)]
    try:
        while processes[0].poll() is None and not checkpoint_of_burn_in(output, burn_in).is_file():
            time.sleep(1)
        exit_on_error(processes[0].poll())
        share_burn_in(output, baseline, burn_in)
        baseline.mkdir(parents=True, exist_ok=True)
        console = baseline / CONSOLE_FILE
        with console.open("w") as file:
            command = [sys.executable, *baseline_command]
            processes += [subprocess.Popen(command, env=env, stdout=file, stderr=file)]
        while processes[0].poll() is None and not processes[1].poll():
            time.sleep(1)
        exit_on_error(processes[0].poll())
        if processes[1].poll() is None:
            print(f"finishing the training with the labeled images only: {console}", flush=True)
        if code := processes[1].wait():
            print(f"The training with the labeled images only failed: {console}")
            sys.exit(code)
    finally:
        for process in processes:
            process.terminate()  # it saves a checkpoint; without effect if it has ended
        for process in processes:
            process.wait()


def exit_on_error(code: int | None) -> None:
    """Exit with the code of a training that failed; it has printed the reason."""
    if code:
        sys.exit(code)


def share_burn_in(source: Path, target: Path, burn_in: int) -> None:
    """Let a new run continue from the end of another run's burn-in, which is the same for both."""
    checkpoint = checkpoint_of_burn_in(source, burn_in)
    if checkpoint.is_file() and not (target / LAST_CHECKPOINT).is_file():
        start_from_burn_in(target, source, burn_in)


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
    exit_on_error(subprocess.run([sys.executable, *command]).returncode)


if __name__ == "__main__":
    # Like Ctrl-C, it has to stop the trainings.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    main()
