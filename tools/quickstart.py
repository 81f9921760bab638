#!/usr/bin/env python
"""The main job in small: make a data set, train on it, draw pictures, write a report.

    make quickstart        or        python tools/quickstart.py [KEY VALUE ...]

Called again it goes on where it was stopped, or shows the results of what is finished.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "datasets"))

from make_synthetic import make_dataset  # noqa: E402

from locreweight.config import load_config
from locreweight.engine.inference import find_inputs
from locreweight.engine.predictor import load_predictor
from locreweight.errors import UsageError
from predict import predict  # noqa: E402
from report import write_report  # noqa: E402
from summarize import results_of, table  # noqa: E402

CONFIG = "configs/quickstart.yaml"
PICTURES = 12


def main() -> None:
    os.chdir(ROOT)  # the config names its data from there
    options = sys.argv[1:]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = ["MODEL.DEVICE", device, *options]

    print("1/3  making the data set: 40 labeled images, 500 unlabeled, 200 to test on", flush=True)
    make_dataset(ROOT / "datasets/synthetic", labeled=40, unlabeled=500, val=200, size=64, seed=0)

    command = ["train_net.py", "--config-file", CONFIG, "--resume", *options]
    print(f"2/3  training on {device}: python {' '.join(command)}", flush=True)
    if code := subprocess.run([sys.executable, *command]).returncode:
        sys.exit(code)  # it has said why

    print("3/3  drawing, and writing the report", flush=True)
    output = ROOT / load_config(str(ROOT / CONFIG), options).OUTPUT_DIR
    files = find_inputs(["datasets/synthetic/val"])[:PICTURES]
    predict(load_predictor(str(output)), files, output / "detections", threshold=0.5, batch=1)
    write_report([output], output / "report.html", images=200)
    print(f"\n{table(results_of(output))}\n")
    print(f"report         {output / 'report.html'}")
    print(f"detections     {output / 'detections'}")
    print(f"pseudo-labels  {output / 'panels'}")
    print(f"curves         tensorboard --logdir {output}")
    print(f"checkpoints    {output}: model_best.pth, model_final.pth (the teacher is `model`)")
    print("to train anew, remove that folder; to train on your own data, see README.md")


if __name__ == "__main__":
    try:
        main()
    except (FileExistsError, UsageError) as error:
        sys.exit(f"error: {error}")
