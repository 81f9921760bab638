"""Processes that are killed while they train. ``python -m tests.soak`` repeats it many times."""

import os
import signal
from pathlib import Path

import pytest

from tests import soak
from tests.engine.tiny_training import build_trainer, restored_loggers_and_signals, training_config

pytestmark = pytest.mark.slow

LAUNCHED = ([], "--num-gpus", "2", "--dist-url", "auto")
TORCHRUN = (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],)


@pytest.fixture
def run(datasets, tmp_path):
    """Starts or resumes the run of a test in a new process, which is killed after the test."""
    processes = []

    def begin(*how, **settings):
        processes.append(soak.start(tmp_path, datasets, settings, *how))
        return processes[-1]

    yield begin
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def output_of(folder):
    return (folder / "output.txt").read_text()


def children_of(pid):
    return [int(i) for i in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def processes_of(launcher):
    """The training processes of a launcher, without the resource tracker of multiprocessing."""
    commands = {i: Path(f"/proc/{i}/cmdline").read_bytes() for i in children_of(launcher.pid)}
    return [i for i, command in commands.items() if b"resource_tracker" not in command]


def is_gone(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


def test_killed_process_loses_nothing(run, datasets, tmp_path):
    """Killed during training, and while it writes a checkpoint."""
    uninterrupted = tmp_path / "uninterrupted"
    settings = soak.SETTINGS | {"DATASETS.TEST": datasets["DATASETS.TEST"]}
    with restored_loggers_and_signals():
        build_trainer(training_config(datasets, uninterrupted, settings)).train()

    process, trains = run(), soak.said(tmp_path, "iter: 19")
    assert soak.wait_for(process, trains)
    assert soak.end_by(process, signal.SIGKILL) == -signal.SIGKILL
    soak.check_files(tmp_path)

    process, resumes = run(**{"DATALOADER.NUM_WORKERS": 2}), soak.said(tmp_path, "resumed after")
    assert soak.wait_for(process, resumes)
    assert soak.wait_for(process, soak.writing(tmp_path))
    assert soak.end_by(process, signal.SIGKILL) == -signal.SIGKILL
    soak.check_files(tmp_path)

    # The third process finishes the run.
    process, trained = run(), soak.said(tmp_path, "iter: 69")
    assert process.wait() == 0, output_of(tmp_path)[-2000:]
    assert trained()
    assert soak.differences(soak.result_of(uninterrupted), soak.result_of(tmp_path)) == []


SMALL = {
    "SOLVER.MAX_ITER": 40,
    "SOLVER.STEPS": (25,),
    "SOLVER.CHECKPOINT_PERIOD": 5,
    "SEMI.BURN_IN_ITERS": 10,
    "TEST.EVAL_PERIOD": 0,
}


def test_two_processes_that_are_killed_or_stopped_lose_nothing(run, datasets, tmp_path):
    """Detectron2's launcher and torchrun give the same result bit for bit."""
    uninterrupted = tmp_path / "uninterrupted"
    uninterrupted.mkdir()
    reference = soak.start(uninterrupted, datasets, SMALL, *LAUNCHED)
    assert reference.wait() == 0, output_of(uninterrupted)[-2000:]
    # Each message is logged once.
    text = (uninterrupted / "log.txt").read_text()
    assert text.count("Effective values on 2 process(es)") == 1
    assert text.count("2 labeled + 2 unlabeled images per iteration (1 + 1 per process)") == 1
    (results,) = [line for line in soak.metrics_of(uninterrupted) if "bbox/AP" in line]
    assert "student/bbox/AP" in results

    # One process is killed: the other process and the launcher end, too.
    launcher = run(*LAUNCHED, "--timeout", "60", **SMALL)
    assert soak.wait_for(launcher, soak.said(tmp_path, f"saved {tmp_path}"))
    first, second = processes_of(launcher)
    os.kill(second, signal.SIGKILL)
    assert launcher.wait(timeout=120) not in (0, soak.EXIT_CODE)
    assert is_gone(first)
    soak.check_files(tmp_path)

    # One process gets a signal: both stop.
    launcher, resumed = run(*TORCHRUN, **SMALL), soak.said(tmp_path, f"saved {tmp_path}")
    assert soak.wait_for(launcher, resumed)
    os.kill(processes_of(launcher)[1], signal.SIGUSR1)
    assert launcher.wait(timeout=120) != 0
    assert "stopped by a signal, exit code 75" in output_of(tmp_path)
    assert (tmp_path / "last_checkpoint").read_text() == "model_resume.pth"

    # The launcher gets a signal: it forwards it and exits with the same code.
    launcher, resumed = run(*LAUNCHED, **SMALL), soak.said(tmp_path, f"saved {tmp_path}")
    assert soak.wait_for(launcher, resumed)
    os.kill(launcher.pid, signal.SIGTERM)
    assert launcher.wait(timeout=120) == soak.EXIT_CODE, output_of(tmp_path)[-2000:]

    assert run(*TORCHRUN, **SMALL).wait() == 0, output_of(tmp_path)[-2000:]
    assert soak.differences(soak.result_of(uninterrupted), soak.result_of(tmp_path)) == []
