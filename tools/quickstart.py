#!/usr/bin/env python
"""Complete example: create a synthetic dataset, train on it, draw detections, write a report.

    make quickstart        or        python tools/quickstart.py [KEY VALUE ...]

If it was interrupted, the same command resumes the training. After that, it shows the results.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from locreweight.command_line import ConfigArgumentParser
from locreweight.config import load_config
from locreweight.engine.detection_files import PictureWriter
from locreweight.engine.inference import find_inputs
from locreweight.engine.prediction import predict_files
from locreweight.engine.predictor import Predictor
from locreweight.engine.run_folder import open_runs, summary_table
from locreweight.errors import UsageError
from locreweight.visualization.report import write_report

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "configs/quickstart.yaml"
NUM_PICTURES = 12


def main() -> None:
    parser = ConfigArgumentParser(description=__doc__)
    os.chdir(ROOT)  # paths in the config are relative to the repository
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = ["MODEL.DEVICE", device, *parser.parse_args().opts]

    print("1/3  creating the dataset: 40 labeled, 500 unlabeled and 200 test images", flush=True)
    sizes = ["--labeled", "40", "--unlabeled", "500", "--val", "200", "--size", "64", "--seed", "0"]
    run_script("datasets/make_synthetic.py", *sizes)

    arguments = ["--config-file", CONFIG, "--resume", *options]
    print(f"2/3  training on {device}: python train_net.py {' '.join(arguments)}", flush=True)
    run_script("train_net.py", *arguments)

    print("3/3  drawing detections and writing the report", flush=True)
    output = ROOT / load_config(str(ROOT / CONFIG), options).OUTPUT_DIR
    files = find_inputs(["datasets/synthetic/val"])[:NUM_PICTURES]
    detector = Predictor(output)
    predict_files(detector, files, [PictureWriter(output / "detections")])
    write_report([output], output / "report.html", images=200)
    print(f"\n{summary_table(open_runs([output]))}\n")
    print(f"report         {output / 'report.html'}")
    print(f"detections     {output / 'detections'}")
    print(f"pseudo-labels  {output / 'panels'}")
    print(f"curves         tensorboard --logdir {output}")
    print(f"checkpoints    {output}: model_best.pth, model_final.pth (the teacher is `model`)")
    print("To train again from scratch, remove that folder. For your own data, see README.md.")


def run_script(*command: str) -> None:
    """Run a Python script. If it fails, exit with its code; it has printed the reason."""
    if code := subprocess.run([sys.executable, *command]).returncode:
        sys.exit(code)


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        sys.exit(f"error: {error}")
