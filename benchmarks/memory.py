#!/usr/bin/env python
"""Peak memory of a training step, compared with plain Detectron2 on the same images.

    python -m benchmarks.memory
    python -m benchmarks.memory --config-file configs/detectors/gpu-convnext-tiny.yaml
    python -m benchmarks.memory --paper     # 2 + 8 images of 800 x 1333 pixels' area; for a GPU

The baseline holds two models and the activations of student and teacher. The step also holds the
optimizer's momentum and the teacher's feature maps. The baseline is also measured with SGD and an
EMA update. Each row is measured in a new process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.timing import print_table, seconds_of, use_cpu_time
from benchmarks.workload import (
    BASE,
    Detectron2Baseline,
    Detectron2Training,
    TrainerStep,
    Workload,
)
from locreweight.command_line import ConfigArgumentParser


@dataclass(frozen=True)
class Cost:
    """Time and memory of a repetition.

    Attributes:
        seconds: median time.
        before_mib: peak memory before the first repetition, with the models and PyTorch itself.
        peak_mib: peak memory. On a GPU, this is what PyTorch allocated there; otherwise, it is the
            resident memory of the process.
    """

    seconds: float
    before_mib: float
    peak_mib: float


def measure_in_subprocess(
    workload: Workload,
    *,
    baseline: bool = False,
    updates: bool = False,
    repeats: int,
    options: Sequence[str] = (),
    method: str = "",
    warm_up: int = 1,
    cpu_time: bool = False,
) -> Cost:
    """Measure the training step, or the plain Detectron2 baseline, in a new process.

    Args:
        workload: the input.
        baseline: measure the baseline.
        updates: measure the baseline with SGD and an EMA update.
        repeats: number of measured repetitions.
        options: ``KEY VALUE`` pairs that override the config.
        method: method of the training step, as for ``--method``.
        warm_up: number of repetitions before the measured ones.
        cpu_time: measure the CPU time.
    """
    settings = [baseline, updates, repeats, list(options), method, warm_up, cpu_time]
    arguments = json.dumps([asdict(workload), *settings])
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", "--measure", arguments]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Cost(**json.loads(result.stdout.splitlines()[-1]))


def measure(
    workload: Workload,
    baseline: bool,
    updates: bool,
    repeats: int,
    options: list[str],
    method: str,
    warm_up: int,
    cpu_time: bool,
) -> Cost:
    """Measure in this process; for arguments see :func:`measure_in_subprocess`."""
    if cpu_time:
        use_cpu_time()
    detectron2 = (Detectron2Training if updates else Detectron2Baseline)(workload, options)
    device = detectron2.device
    function: Detectron2Baseline | TrainerStep = detectron2
    if not baseline:
        function = TrainerStep(workload, detectron2.student.state_dict(), options, method)
    del detectron2
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = peak_mib(device)
    seconds = [seconds_of(function, device) for _ in range(warm_up + repeats)][warm_up:]
    return Cost(statistics.median(seconds), before, peak_mib(device))


def peak_mib(device: torch.device) -> float:
    """Return the peak memory so far; on a GPU, since the last reset."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # Not getrusage: its peak is inherited from the parent process.
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


def main() -> None:
    parser = ConfigArgumentParser(description=__doc__)
    parser.add_argument(
        "--short-side", type=int, default=Workload().short_side, help="of the images, in pixels"
    )
    parser.add_argument("--labeled", type=int, default=Workload().labeled, help="labeled images")
    parser.add_argument(
        "--unlabeled", type=int, default=Workload().unlabeled, help="unlabeled images"
    )
    parser.add_argument("--config-file", default=BASE, help="config of the detector")
    parser.add_argument(
        "--paper", action="store_true", help="2 + 8 images of 800 x 1333 pixels' area; for a GPU"
    )
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # for measure_in_subprocess
    args = parser.parse_args()
    if args.measure:
        workload, *settings = json.loads(args.measure)
        print(json.dumps(asdict(measure(Workload(**workload), *settings))))
        return
    sizes = {name: getattr(args, name) for name in ("short_side", "labeled", "unlabeled")}
    if args.paper:
        sizes = {"short_side": 894, "labeled": 2, "unlabeled": 8}
    workload = Workload.of_config(args.config_file, **sizes)
    costs = {
        name: measure_in_subprocess(
            workload, baseline=baseline, updates=updates, repeats=2, options=options
        )
        for name, baseline, updates, options in (
            ("plain Detectron2", True, False, []),
            ("plain Detectron2 with SGD and EMA", True, True, []),
            ("step", False, False, args.opts),
        )
    }
    references = [cost.peak_mib for cost in costs.values()][:2]
    rows = [
        [
            name,
            f"{c.before_mib:.0f}",
            f"{c.peak_mib:.0f}",
            *(f"{c.peak_mib / reference:.3f}" for reference in references),
        ]
        for name, c in costs.items()
    ]
    headers = ["", "MiB before", "peak MiB", "peak / plain", "peak / with updates"]
    print_table(f"memory: {workload}", headers, rows)


if __name__ == "__main__":
    main()
