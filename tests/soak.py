"""Kill small trainings many times at random moments, and check that nothing is lost.

    python -m tests.soak --kills 50

Runs of ``train_net.py --resume`` are killed (by SIGKILL, sometimes SIGTERM or SIGUSR1) and started
again until they finish: at any time, while a checkpoint is written, and in evaluation. After each
kill every checkpoint must be readable. In the end, weights, optimizer and metrics must equal those
of an uninterrupted run bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from locreweight.engine.writers import TIMES
from tests.engine.tiny_training import TRAINING, make_datasets, same
from tests.modeling.tiny_model import TINY, as_options

ROOT = Path(__file__).parents[1]
SETTINGS = {
    "SEMI.BURN_IN_ITERS": 15,
    "SEMI.NORMALIZE_BY_SAMPLED": True,
    "SEMI.PSEUDO_LABEL_THRESHOLD": 0.05,
    "SOLVER.CLIP_GRADIENTS.ENABLED": True,
    "SOLVER.MAX_ITER": 70,
    "SOLVER.CHECKPOINT_PERIOD": 8,
    "SOLVER.STEPS": (40,),
    "SOLVER.WARMUP_ITERS": 5,
    "SOLVER.KEEP_CHECKPOINTS": 2,
    "TEST.EVAL_PERIOD": 20,
}
EXIT_CODE = 75  # of a run that was stopped by a signal


# -- one process -----------------------------------------------------------------------------------


def command(
    folder: Path, datasets: dict, settings: dict, launcher: Sequence[str] = (), *flags: str
) -> list[str]:
    """A command that starts or resumes the run in a folder, to be run in :data:`ROOT`.

    Args:
        folder: of the run.
        datasets, settings: config keys and values.
        launcher: arguments of ``python`` before the script.
        flags: further arguments of the script.
    """
    options = TINY | TRAINING | datasets | SETTINGS | {"OUTPUT_DIR": folder} | settings
    config = ["--config-file", str(ROOT / "configs/Base-LocReweight.yaml"), *as_options(options)]
    return [sys.executable, *launcher, "train_net.py", "--resume", "--verbose", *flags, *config]


def environment() -> dict[str, str]:
    """Environment variables of a run."""
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def start(
    folder: Path, datasets: dict, settings: dict, launcher: Sequence[str] = (), *flags: str
) -> subprocess.Popen:
    """Run :func:`command` in a new process, in its own process group."""
    with open(folder / "output.txt", "a") as output:
        return subprocess.Popen(
            command(folder, datasets, settings, launcher, *flags),
            cwd=ROOT,
            env=environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_for(process: subprocess.Popen, moment: Callable[[], bool], seconds: float = 300) -> bool:
    """Wait for a moment; returns False if the process ends first."""
    end = time.monotonic() + seconds
    while process.poll() is None:
        if moment():
            return True
        assert time.monotonic() < end, "the moment did not come and the process did not end"
        time.sleep(0.001)
    return False


def end_by(process: subprocess.Popen, number: signal.Signals, seconds: float = 120) -> int:
    """Signal the process group, as terminals and schedulers do; returns the exit code."""
    if process.poll() is None:
        os.killpg(process.pid, number)
    return process.wait(timeout=seconds)


# -- moments ---------------------------------------------------------------------------------------


def writing(folder: Path) -> Callable[[], bool]:
    """The moment while a checkpoint is written."""
    return lambda: any(name.endswith(".partial") for name in os.listdir(folder))


def said(folder: Path, text: str) -> Callable[[], bool]:
    """The moment when the process that is started next has printed a text."""
    file = folder / "output.txt"
    begin = file.stat().st_size if file.exists() else 0

    def moment() -> bool:
        with file.open("rb") as output:
            output.seek(begin)
            return text.encode() in output.read()

    return moment


def after(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


# -- checks ----------------------------------------------------------------------------------------


def check_files(folder: Path) -> int:
    """Check that all checkpoints can be read and the last one exists; returns their number."""
    files = list(folder.glob("*.pth"))
    for file in files:
        content = torch.load(file, weights_only=True)
        assert {"model", "student", "trainer"} <= content.keys(), file
    last = folder / "last_checkpoint"
    assert not last.exists() or folder / last.read_text() in files
    return len(files)


def metrics_of(folder: Path) -> list[dict]:
    """All lines of metrics.json, without times."""
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [{name: x for name, x in line.items() if name not in TIMES} for line in lines]


def result_of(folder: Path) -> dict[str, object]:
    """The results of a run, for :func:`differences`."""
    result: dict[str, object] = {"metrics": metrics_of(folder)}
    result["files"] = sorted(f.name for f in folder.glob("*.pth") if f.stem != "model_resume")
    for name in ("model_final", "model_best"):
        content = torch.load(folder / f"{name}.pth", weights_only=True)
        trainer = content["trainer"]
        optimizer = trainer["optimizer"]["state"]
        result[f"{name} teacher"] = content["model"]
        result[f"{name} student"] = content["student"]
        result[f"{name} momentum"] = {str(i): s["momentum_buffer"] for i, s in optimizer.items()}
        hooks = {k: v for k, v in trainer["hooks"].items() if k != "metrics"}
        result[f"{name} history"] = trainer["hooks"]["metrics"]["history"]
        result[f"{name} rest"] = [trainer["optimizer"]["param_groups"], hooks] + [
            trainer[key] for key in ("iteration", "seed", "grad_scaler", "skipped_steps")
        ]
    return result


def differences(first: dict[str, object], second: dict[str, object]) -> list[str]:
    """Names of the results that are not equal bit for bit."""
    assert first.keys() == second.keys()
    return [name for name in first if not _equal(first[name], second[name])]


def _equal(first: object, second: object) -> bool:
    if isinstance(first, dict) and isinstance(next(iter(first.values())), torch.Tensor):
        return same(first, second)
    return repr(first) == repr(second)  # NaN equals NaN


# -- many kills ------------------------------------------------------------------------------------


def uninterrupted(folder: Path, datasets: dict) -> tuple[dict[str, object], float]:
    """The result of an uninterrupted run, and its duration in seconds."""
    folder.mkdir()
    begin = time.monotonic()
    assert start(folder, datasets, {}).wait() == 0, (folder / "output.txt").read_text()[-2000:]
    return result_of(folder), time.monotonic() - begin


def killed_run(
    folder: Path, datasets: dict, duration: float, rng: random.Random, kills: int
) -> Counter[str]:
    """Kill a run up to ``kills`` times until it finishes; counts moments and signals."""
    folder.mkdir()
    stops: Counter[str] = Counter()
    while True:
        workers = rng.choice([0, 1, 2])
        when = rng.choice(["any time", "any time", "training", "writing", "evaluation"])
        how = rng.choice([signal.SIGKILL] * 4 + [signal.SIGTERM, signal.SIGUSR1])
        moments = {
            "any time": [after(rng.uniform(0, duration))],
            "training": [said(folder, "Starting training"), lambda: after(rng.uniform(0, 5))],
            "writing": [said(folder, "Starting training"), lambda: after(rng.uniform(0, 5))],
            "evaluation": [said(folder, "Start inference"), lambda: after(rng.uniform(0, 0.5))],
        }[when]
        process = start(folder, datasets, {"DATALOADER.NUM_WORKERS": workers})
        reached = stops.total() < kills and all(
            wait_for(process, moment() if i else moment) for i, moment in enumerate(moments)
        )
        if reached and when == "writing":
            reached = wait_for(process, writing(folder))
        if not reached:
            assert process.wait() == 0, (folder / "output.txt").read_text()[-3000:]
            return stops
        code = end_by(process, how)
        if how is signal.SIGKILL:
            assert code in (-how, 0), code
        else:
            # Before the handlers are installed, the signal itself ends the process.
            assert code in (EXIT_CODE, -how, 0), (code, (folder / "output.txt").read_text()[-3000:])
        check_files(folder)
        stops[f"{how.name}, {when}" + (f", exit code {code}" if code != -how else "")] += 1
        print(f"{folder.name}: {how.name}, {when}, exit code {code}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="minimum number of SIGKILLs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--per-run", type=int, default=12, help="maximum number of stops of one run"
    )
    args = parser.parse_args()
    rng = random.Random(args.seed)
    stops: Counter[str] = Counter()
    runs, begin = 0, time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        datasets = make_datasets(Path(temporary, "datasets"))
        reference, duration = uninterrupted(Path(temporary, "uninterrupted"), datasets)
        print(f"an uninterrupted run takes {duration:.0f} s", flush=True)
        while sum(n for name, n in stops.items() if name.startswith("SIGKILL")) < args.kills:
            runs += 1
            folder = Path(temporary, f"run {runs}")
            stops += killed_run(folder, datasets, duration, rng, args.per_run)
            different = differences(reference, result_of(folder))
            assert not different, f"{folder.name} differs in {different}"
            print(f"{folder.name}: equal to the uninterrupted run bit for bit", flush=True)
    for name, count in sorted(stops.items()):
        print(f"{count:4d} {name}")
    print(f"{stops.total()} stops in {runs} runs, {time.monotonic() - begin:.0f} s: nothing lost")


if __name__ == "__main__":
    main()
