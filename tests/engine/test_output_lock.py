"""Two trainings never write into one folder."""

import subprocess
import sys

import pytest

from locreweight.engine.startup_checks import lock_output_dir
from locreweight.errors import UsageError
from tests.engine.tiny_training import TRAINING, make_datasets
from tests.modeling.tiny_model import ROOT, TINY, as_options

HOLD = """
import multiprocessing, sys, time
from pathlib import Path
from locreweight.engine.startup_checks import lock_output_dir
lock_output_dir(Path(sys.argv[1]))
worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
worker.start()
print(worker.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process, with a worker, that has claimed the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    worker = int(process.stdout.readline())
    yield process
    process.kill()
    process.wait()
    subprocess.run(["kill", "-9", str(worker)], stderr=subprocess.DEVNULL)


def test_a_folder_that_another_training_writes_into_is_refused(holder, tmp_path):
    with pytest.raises(UsageError, match=f"another training is writing into .*{tmp_path.name}"):
        lock_output_dir(tmp_path)
    lock_output_dir(tmp_path / "other")


def test_a_second_training_ends_before_it_writes(holder, tmp_path):
    base = str(ROOT / "configs/Base-LocReweight.yaml")
    settings = TINY | TRAINING | make_datasets(tmp_path / "data") | {"OUTPUT_DIR": str(tmp_path)}
    command = [sys.executable, str(ROOT / "train_net.py"), "--config-file", base]
    done = subprocess.run([*command, *as_options(settings)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: another training is writing")
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "data"}


def test_a_process_that_was_killed_holds_nothing_not_even_through_its_workers(holder, tmp_path):
    holder.kill()
    holder.wait()
    lock_output_dir(tmp_path)


def test_the_holder_may_claim_again_and_still_holds(tmp_path):
    for _ in range(2):
        lock_output_dir(tmp_path / "new/folder")
    other = "import sys; from pathlib import Path\n"
    other += "from locreweight.engine.startup_checks import lock_output_dir; lock_output_dir(Path(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", other, str(tmp_path / "new/folder")], capture_output=True, text=True
    )
    assert done.returncode == 1 and "another training" in done.stderr


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch, caplog):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.lockf", unsupported)
    lock_output_dir(tmp_path)
    assert "cannot see whether another training" in caplog.text
