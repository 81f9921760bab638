"""Checkpoint files survive kills, full disks and damage; old ones are pruned."""

import errno
import logging
import os
import random
import resource
import shutil
import signal
import time
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from detectron2.utils import comm

from locreweight.checkpoint import files
from locreweight.checkpoint.checkpointer import SafeCheckpointer
from locreweight.errors import UsageError
from tests.in_two_processes import run_in_two_processes


class Counter:
    """Stand-in for a trainer, whose state depends only on the iteration."""

    def __init__(self, iteration=-1):
        self.iteration = iteration

    def state_dict(self):
        return {"iteration": self.iteration, "rates": [0.1 * self.iteration]}

    def load_state_dict(self, state):
        self.iteration = state["iteration"]


class Run:
    """Saves and resumes a small model, whose weights equal the iteration."""

    def __init__(self, folder, keep=0):
        self.model = torch.nn.Linear(64, 64)
        self.trainer = Counter()
        self.checkpointer = SafeCheckpointer(
            self.model, str(folder), keep=keep, trainer=self.trainer
        )

    def save(self, iteration, name=None):
        self.trainer.iteration = iteration
        torch.nn.init.constant_(self.model.weight, iteration)
        return self.checkpointer.save(name or f"model_{iteration:07d}")

    def resume(self):
        """Resume and return the iteration of the checkpoint; None if there is none."""
        torch.nn.init.constant_(self.model.weight, -1)
        self.trainer.iteration = -1
        self.checkpointer.resume_or_load("", resume=True)
        iteration = self.trainer.iteration
        if iteration == -1:
            return None
        assert torch.equal(self.model.weight, torch.full((64, 64), float(iteration)))
        return iteration


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


def names_in(folder):
    return sorted(file.name for file in Path(folder).iterdir())


def in_a_child(work: Callable[[], None]) -> int:
    """Call a function in a child process and return the exit status of ``os.waitpid``."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


# --- saving and kills -----------------------------------------------------------------------------


def test_resume_loads_the_saved_checkpoint(run, tmp_path):
    assert run.resume() is None
    assert run.save(5)
    assert names_in(tmp_path) == ["last_checkpoint", "model_0000005.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000005.pth"
    assert Run(tmp_path).resume() == 5


def test_save_does_nothing_without_a_folder_or_on_other_processes(tmp_path):
    model = torch.nn.Linear(1, 1)
    assert not SafeCheckpointer(model).save("model")
    assert not SafeCheckpointer(model, str(tmp_path), save_to_disk=False).save("model")
    assert names_in(tmp_path) == []


def test_folders_that_could_not_be_resumed_are_rejected():
    with pytest.raises(UsageError, match="OUTPUT_DIR 's3://bucket/run'"):
        Run("s3://bucket/run")
    with pytest.raises(UsageError, match="could not be resumed"):
        Run("better?/run")


def kill_before(monkeypatch, count):
    """Kill the process before it has done ``count + 1`` operations on the disk."""
    steps = iter(range(count))

    def killing(function):
        def step(*args, **kwargs):
            if next(steps, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return step

    def in_halves(content, file):
        buffer = torch.serialization.io.BytesIO()
        save(content, buffer)
        half = len(buffer.getvalue()) // 2
        for part in (buffer.getvalue()[:half], buffer.getvalue()[half:]):
            killing(file.write)(part)
            file.flush()

    save = torch.save
    monkeypatch.setattr(torch, "save", in_halves)
    monkeypatch.setattr(os, "fsync", killing(os.fsync))
    monkeypatch.setattr(os, "replace", killing(os.replace))
    monkeypatch.setattr(Path, "unlink", killing(Path.unlink))


# The content is written in two parts, then the file is synced and renamed and the folder is synced.
# The same three operations for `last_checkpoint`, then one old file is deleted.
STEPS = 2 + 3 + 3 + 1


@pytest.mark.parametrize("count", range(STEPS + 1))
@pytest.mark.parametrize("name", ["model_0000003", "model_0000002"], ids=["new", "overwritten"])
def test_kill_at_any_step_leaves_intact_checkpoints(tmp_path, monkeypatch, count, name):
    run = Run(tmp_path, keep=2)
    for iteration in range(3):
        run.save(iteration)
    with monkeypatch.context() as patch:

        def work():
            kill_before(patch, count)
            run.save(3, name)

        status = in_a_child(work)
    # No old file is deleted if a file is overwritten.
    steps = STEPS if name == "model_0000003" else STEPS - 1
    assert os.WIFSIGNALED(status) == (count < steps)
    last = (tmp_path / "last_checkpoint").read_text()
    assert (tmp_path / last).is_file()
    for file in tmp_path.glob("*.pth"):
        assert torch.load(file, weights_only=True)["trainer"]["iteration"] in range(4)
    assert len(list(tmp_path.glob("*.pth"))) >= 2
    again = Run(tmp_path, keep=2)
    is_last_already = name == "model_0000002"
    assert again.resume() == (3 if (count >= 4 and is_last_already) or count >= 7 else 2)
    assert not list(tmp_path.glob("*.partial"))
    again.save(4)
    assert Run(tmp_path).resume() == 4


@pytest.mark.slow
def test_kills_at_random_times_leave_intact_checkpoints(tmp_path, caplog):
    """A process that only writes checkpoints is killed and resumed again and again."""
    generator = random.Random(0)
    last = -1
    reading, writing = os.pipe()

    def work():
        run = Run(tmp_path, keep=2)
        iteration = run.resume()
        while True:
            iteration = 0 if iteration is None else iteration + 1
            run.save(iteration)
            os.write(writing, b"!")

    caplog.set_level(logging.WARNING)
    for _ in range(20):
        child = os.fork()
        if child == 0:
            try:
                work()
            finally:
                os._exit(1)
        os.read(reading, 1)
        time.sleep(generator.uniform(0.0, 0.05))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        resumed = Run(tmp_path).resume()
        assert resumed >= last
        last = resumed
    assert not caplog.records  # the newest file was always intact


def test_resume_removes_partial_files_of_a_killed_run(run, tmp_path):
    for name in ("model_0000001.pth.partial", "last_checkpoint.partial", "notes.partial"):
        (tmp_path / name).write_bytes(b"half")
    assert run.resume() is None
    assert names_in(tmp_path) == ["notes.partial"]


# --- damaged files --------------------------------------------------------------------------------


def truncate_to(share):
    def damage(file):
        os.truncate(file, int(share * file.stat().st_size))

    return damage


def flip_bit(file):
    """Flip a bit of a weight; the file is still a valid zip archive."""
    content = bytearray(file.read_bytes())
    weight = torch.full((16,), float(3)).numpy().tobytes()
    content[content.index(weight) + 5] ^= 1
    file.write_bytes(content)


def write_other_zip(file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("notes.txt", "not a checkpoint")


def remove_part(part):
    def damage(file):
        content = torch.load(file, weights_only=True)
        del content[part]
        torch.save(content, file)

    return damage


DAMAGE = {
    "empty": truncate_to(0),
    "one byte": lambda file: os.truncate(file, 1),
    "half": truncate_to(0.5),
    "all but the end": truncate_to(0.999),
    "text": lambda file: file.write_text("not a checkpoint"),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "another zip": write_other_zip,
    "a flipped bit": flip_bit,
    "without trainer": remove_part("trainer"),
    "without model": remove_part("model"),
    "a tensor": lambda file: torch.save(torch.zeros(3), file),
    "deleted": os.remove,
}


@pytest.fixture
def three(run):
    for iteration in (1, 2, 3):
        run.save(iteration)
    return run


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_resume_skips_a_damaged_checkpoint_and_names_both(three, tmp_path, caplog, damage):
    damage(tmp_path / "model_0000003.pth")
    with caplog.at_level(logging.WARNING, logger=files.__name__):
        assert Run(tmp_path).resume() == 2
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "model_0000002.pth" in warning and "model_0000003.pth" in warning
    assert "\n" not in warning


def test_resume_from_an_intact_checkpoint_logs_no_warning(three, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert Run(tmp_path).resume() == 3
    assert not caplog.records


LAST = [None, b"", b"model_0000009.pth", b"\xff\x00\n", b"../x.pth", b"x" * 5000]


@pytest.mark.parametrize("content", LAST)
def test_resume_uses_the_newest_if_last_checkpoint_is_unusable(three, tmp_path, caplog, content):
    (tmp_path.parent / "x.pth").write_bytes((tmp_path / "model_0000001.pth").read_bytes())
    (tmp_path / "last_checkpoint").unlink()
    if content is not None:
        (tmp_path / "last_checkpoint").write_bytes(content)
    with caplog.at_level(logging.WARNING, logger=files.__name__):
        assert Run(tmp_path).resume() == 3
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "last_checkpoint" in warning and "model_0000003.pth" in warning


def test_resume_uses_an_older_file_named_by_last_checkpoint(three, tmp_path):
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth\n")
    assert Run(tmp_path).resume() == 1


def test_resume_orders_files_by_the_iteration_in_the_file(three, tmp_path):
    """The names of the best and the final checkpoint contain no iteration."""
    three.save(2, "model_best")
    three.save(5, "model_final")
    (tmp_path / "last_checkpoint").unlink()
    assert Run(tmp_path).resume() == 5
    truncate_to(0.5)(tmp_path / "model_final.pth")
    assert Run(tmp_path).resume() == 3
    truncate_to(0.5)(tmp_path / "model_0000003.pth")
    assert Run(tmp_path).resume() == 2
    truncate_to(0.5)(tmp_path / "model_0000002.pth")
    assert Run(tmp_path).resume() == 2
    truncate_to(0.5)(tmp_path / "model_best.pth")
    assert Run(tmp_path).resume() == 1


def test_resume_uses_files_of_an_earlier_run_last(run, tmp_path):
    for iteration in (8, 9, 1, 2):
        run.save(iteration)
    truncate_to(0.5)(tmp_path / "model_0000002.pth")
    assert Run(tmp_path).resume() == 1
    truncate_to(0.5)(tmp_path / "model_0000001.pth")
    assert Run(tmp_path).resume() == 9


def test_resume_raises_if_all_checkpoints_are_damaged(three, tmp_path):
    for file in tmp_path.glob("*.pth"):
        truncate_to(0.5)(file)
    again = Run(tmp_path)
    assert again.checkpointer.has_checkpoint()
    with pytest.raises(UsageError, match="cannot resume in") as error:
        again.resume()
    for name in ("model_0000001.pth", "model_0000002.pth", "model_0000003.pth", "--resume"):
        assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_resume_raises_if_all_checkpoints_are_deleted(run, tmp_path):
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    with pytest.raises(UsageError, match=r"names 'model_0000003\.pth', which does not exist"):
        run.resume()


def test_resume_ignores_other_weight_files_in_the_folder(run, tmp_path):
    torch.save({"model": {}}, tmp_path / "resnet50.pth")
    assert not run.checkpointer.has_checkpoint()
    assert run.resume() is None


def test_resume_never_loads_wrong_weights_whichever_byte_is_wrong(three, tmp_path):
    """The file is skipped, or the byte has no effect: `Run.resume` checks all weights."""
    file = tmp_path / "model_0000003.pth"
    content = file.read_bytes()
    positions = random.Random(0).sample(range(len(content)), 60)
    resumed = []
    for i in positions:
        file.write_bytes(content[:i] + bytes([content[i] ^ 0xFF]) + content[i + 1 :])
        resumed.append(Run(tmp_path).resume())
    assert set(resumed) <= {2, 3}
    assert resumed.count(2) > 50


def test_resume_skips_a_file_truncated_to_any_length(three, tmp_path):
    file = tmp_path / "model_0000003.pth"
    content = file.read_bytes()
    for length in random.Random(0).sample(range(len(content)), 40):
        file.write_bytes(content[:length])
        assert Run(tmp_path).resume() == 2, length


# --- several processes ----------------------------------------------------------------------------


@pytest.fixture
def as_other_process(monkeypatch):
    """Act as a process that receives a result from the main process."""

    def receive(result):
        monkeypatch.setattr(comm, "is_main_process", lambda: False)
        monkeypatch.setattr(comm, "all_gather", lambda own: [result if own is None else True, own])

    return receive


def test_other_processes_load_the_file_that_the_main_process_found(
    three, tmp_path, as_other_process
):
    as_other_process(tmp_path / "model_0000002.pth")
    assert Run(tmp_path).resume() == 2


def test_other_processes_raise_the_error_of_the_main_process(three, tmp_path, as_other_process):
    as_other_process(UsageError("cannot resume"))
    with pytest.raises(UsageError, match="cannot resume"):
        Run(tmp_path).resume()


def test_resume_raises_if_a_process_does_not_see_the_file(three, tmp_path, as_other_process):
    as_other_process(tmp_path / "elsewhere" / "model_0000002.pth")
    with pytest.raises(UsageError, match="a disk that all machines share"):
        Run(tmp_path).resume()


def resume_twice(folder):
    """Resume in one of several processes, then again with all files damaged; record both."""
    first = Run(folder).resume()
    comm.synchronize()
    if comm.is_main_process():
        for file in Path(folder).glob("*.pth"):
            truncate_to(0.5)(file)
    comm.synchronize()
    with pytest.raises(UsageError) as error:
        Run(folder).resume()
    Path(folder, f"process_{comm.get_rank()}").write_text(f"{first}, then {error.value}")


@pytest.mark.slow
def test_two_processes_resume_from_the_same_file_or_raise_the_same_error(three, tmp_path):
    truncate_to(0.5)(tmp_path / "model_0000003.pth")
    run_in_two_processes(resume_twice, str(tmp_path))
    first, second = ((tmp_path / f"process_{rank}").read_text() for rank in range(2))
    assert first == second
    assert first.startswith("2, then cannot resume in")


# --- a full disk ----------------------------------------------------------------------------------


@contextmanager
def full_disk(limit=10_000):
    """Limit the size of files that this process writes, so that writes fail."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("iteration", [3, 4], ids=["overwritten", "new"])
def test_save_on_a_full_disk_keeps_older_checkpoints(three, tmp_path, caplog, iteration):
    before = names_in(tmp_path)
    with full_disk(), caplog.at_level(logging.ERROR):
        assert not three.save(iteration)
    (error,) = [record.getMessage() for record in caplog.records]
    assert f"model_{iteration:07d}.pth could not be saved: File too large" in error
    assert "MiB free" in error and "the newest checkpoint is model_0000003.pth" in error
    assert names_in(tmp_path) == before
    assert Run(tmp_path).resume() == 3
    assert three.save(5)
    assert Run(tmp_path).resume() == 5


@pytest.mark.parametrize(
    ("failing", "code"),
    [
        ("write", errno.ENOSPC),
        ("write", errno.EDQUOT),
        ("write", errno.EIO),
        ("write", errno.EROFS),
        ("fsync", errno.EIO),
        ("replace", errno.EROFS),
        ("last_checkpoint", errno.ENOSPC),
    ],
)
def test_failed_save_keeps_older_checkpoints(three, tmp_path, monkeypatch, caplog, failing, code):
    calls = []

    def fail(*args, **kwargs):
        calls.append(args)
        if failing != "last_checkpoint" or "last_checkpoint" in str(args[1:]):
            raise OSError(code, os.strerror(code))
        return replace(*args, **kwargs)

    replace = os.replace
    owner, name = {"write": (torch, "save"), "fsync": (os, "fsync")}.get(failing, (os, "replace"))
    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(owner, name, fail)
        assert not three.save(4)
    assert calls
    assert f"could not be saved: {os.strerror(code)}" in caplog.text
    assert not list(tmp_path.glob("*.partial"))
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000003.pth"
    assert Run(tmp_path).resume() == 3


def test_save_to_a_deleted_folder_returns_false(three, tmp_path, caplog):
    shutil.rmtree(tmp_path)
    with caplog.at_level(logging.ERROR):
        assert not three.save(4)
    assert "there is no checkpoint yet" in caplog.text


def test_failed_save_of_the_final_checkpoint_raises(three, tmp_path):
    with full_disk(), pytest.raises(UsageError, match=r"model_final\.pth could not be") as error:
        three.save(9, "model_final")
    assert "model_0000003.pth" in str(error.value) and "--resume" in str(error.value)
    assert Run(tmp_path).resume() == 3


def test_interrupted_save_leaves_no_file(three, tmp_path, monkeypatch):
    def interrupt(content, file):
        file.write(b"half")
        raise KeyboardInterrupt

    before = names_in(tmp_path)
    monkeypatch.setattr(torch, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        three.save(4)
    assert names_in(tmp_path) == before


def test_save_raises_programming_errors(three):
    three.trainer.state_dict = lambda: {"iteration": (i for i in range(3))}
    with pytest.raises(TypeError, match="generator"):
        three.save(4)


# --- pruning --------------------------------------------------------------------------------------


def iterations_in(folder):
    return sorted(int(file.stem[6:]) for file in Path(folder).glob("model_0*.pth"))


@pytest.mark.parametrize(("keep", "expected"), [(0, [0, 1, 2, 3, 4, 5]), (1, [5]), (3, [3, 4, 5])])
def test_prune_keeps_the_newest(tmp_path, keep, expected):
    run = Run(tmp_path, keep)
    for iteration in range(6):
        run.save(iteration)
    assert iterations_in(tmp_path) == expected
    assert Run(tmp_path).resume() == 5


def test_resumed_run_prunes_files_of_earlier_starts(tmp_path):
    for iteration in range(6):
        run = Run(tmp_path, keep=2)
        run.resume()
        run.save(iteration)
    assert iterations_in(tmp_path) == [4, 5]


def test_prune_keeps_best_final_and_other_files(tmp_path):
    run = Run(tmp_path, keep=1)
    run.save(0, "model_best")
    run.save(1, "model_final")
    (tmp_path / "model_0000000_copy.pth").write_text("")
    (tmp_path / "model_zoo.pth").write_text("")
    before = set(names_in(tmp_path))
    for iteration in range(2, 6):
        run.save(iteration)
    assert set(names_in(tmp_path)) == before | {"model_0000005.pth"}


def test_saving_the_best_checkpoint_prunes_nothing(tmp_path):
    run = Run(tmp_path, keep=2)
    run.save(1)
    run.save(2)
    run.save(2, "model_best")
    assert iterations_in(tmp_path) == [1, 2]
    assert Run(tmp_path).resume() == 2


def test_prune_ignores_later_files_of_an_earlier_run(tmp_path):
    for iteration in (7, 8, 9):
        Run(tmp_path).save(iteration)
    run = Run(tmp_path, keep=2)
    for iteration in (1, 2, 3):
        run.save(iteration)
    assert iterations_in(tmp_path) == [2, 3, 7, 8, 9]


def test_failed_save_prunes_nothing(tmp_path):
    run = Run(tmp_path, keep=2)
    for iteration in (1, 2):
        run.save(iteration)
    with full_disk():
        for iteration in (3, 4, 5):
            assert not run.save(iteration)
    assert iterations_in(tmp_path) == [1, 2]


def test_prune_warns_about_files_that_cannot_be_deleted(tmp_path, caplog, monkeypatch):
    run = Run(tmp_path, keep=1)
    run.save(1)

    def fail(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(Path, "unlink", fail)
        assert run.save(2)
    assert "cannot delete" in caplog.text and "model_0000001.pth" in caplog.text


def test_negative_keep_raises(tmp_path):
    with pytest.raises(UsageError, match=r"SOLVER\.KEEP_CHECKPOINTS is -1"):
        Run(tmp_path, keep=-1)
