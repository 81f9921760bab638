"""A run's checkpoints survive kills, full disks and damage; old ones go, the best and last stay."""

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
from detectron2.engine import launch
from detectron2.utils import comm

from locreweight.checkpoint import files as files
from locreweight.checkpoint.checkpointer import SafeCheckpointer
from locreweight.errors import UsageError


class Counter:
    """Stands in for a trainer: all that it is follows from the iteration."""

    def __init__(self, iteration=-1):
        self.iteration = iteration

    def state_dict(self):
        return {"iteration": self.iteration, "rates": [0.1 * self.iteration]}

    def load_state_dict(self, state):
        self.iteration = state["iteration"]


class Run:
    """Checkpoints of a small model in a folder, whose weights are the iteration."""

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
        """The iteration that is gone on from; None if there is nothing to go on from."""
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
    """Runs something in a process of its own; returns how that ended, as ``os.waitpid`` says."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


# --- whole files ----------------------------------------------------------------------------------


def test_a_checkpoint_is_resumed_from(run, tmp_path):
    assert run.resume() is None
    assert run.save(5)
    assert names_in(tmp_path) == ["last_checkpoint", "model_0000005.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000005.pth"
    assert Run(tmp_path).resume() == 5


def test_nothing_is_written_without_a_folder_or_by_other_processes(tmp_path):
    model = torch.nn.Linear(1, 1)
    assert not SafeCheckpointer(model).save("model")
    assert not SafeCheckpointer(model, str(tmp_path), save_to_disk=False).save("model")
    assert names_in(tmp_path) == []


def test_the_folder_has_to_be_on_this_machine():
    with pytest.raises(UsageError, match="OUTPUT_DIR 's3://bucket/run'"):
        Run("s3://bucket/run")
    with pytest.raises(UsageError, match="could not be resumed"):
        Run("better?/run")


def kill_before(monkeypatch, count):
    """Has the process killed before the so-manieth thing it does to the disk."""
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


# Two writes of the content, then file, name and folder; the same of `last_checkpoint` but for its
# content; one old file goes.
STEPS = 2 + 3 + 3 + 1


@pytest.mark.parametrize("count", range(STEPS + 1))
@pytest.mark.parametrize("name", ["model_0000003", "model_0000002"], ids=["new", "over the old"])
def test_a_kill_at_any_step_leaves_a_whole_set(tmp_path, monkeypatch, count, name):
    run = Run(tmp_path, keep=2)
    for iteration in range(3):
        run.save(iteration)
    with monkeypatch.context() as patch:

        def work():
            kill_before(patch, count)
            run.save(3, name)

        ended = in_a_child(work)
    # Nothing old is deleted where a file of the same name is written again.
    steps = STEPS if name == "model_0000003" else STEPS - 1
    assert os.WIFSIGNALED(ended) == (count < steps)
    last = (tmp_path / "last_checkpoint").read_text()
    assert (tmp_path / last).is_file()
    for file in tmp_path.glob("*.pth"):
        assert torch.load(file, weights_only=True)["trainer"]["iteration"] in range(4)
    assert len(list(tmp_path.glob("*.pth"))) >= 2
    again = Run(tmp_path, keep=2)
    named_before = name == "model_0000002"
    assert again.resume() == (3 if (count >= 4 and named_before) or count >= 7 else 2)
    assert not list(tmp_path.glob("*.partial"))
    again.save(4)
    assert Run(tmp_path).resume() == 4


def test_kills_at_random_moments_leave_a_whole_set(tmp_path, caplog):
    """In a run that does nothing but write; each one goes on where the one before was killed."""
    moments = random.Random(0)
    reached = -1
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
        time.sleep(moments.uniform(0.0, 0.05))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        resumed = Run(tmp_path).resume()
        assert resumed >= reached
        reached = resumed
    assert not caplog.records  # each time the newest file was whole, no older one was needed


def test_what_a_killed_run_left_over_goes_and_nothing_else_does(run, tmp_path):
    for name in ("model_0000001.pth.partial", "last_checkpoint.partial", "notes.partial"):
        (tmp_path / name).write_bytes(b"half")
    assert run.resume() is None
    assert names_in(tmp_path) == ["notes.partial"]


# --- damaged files --------------------------------------------------------------------------------


def truncated_to(share):
    def damage(file):
        os.truncate(file, int(share * file.stat().st_size))

    return damage


def with_flipped_bit(file):
    """In the weights, where the structure of the file stays as it is."""
    content = bytearray(file.read_bytes())
    weight = torch.full((16,), float(3)).numpy().tobytes()
    content[content.index(weight) + 5] ^= 1
    file.write_bytes(content)


def another_zip(file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b"")


def without(part):
    def damage(file):
        content = torch.load(file, weights_only=True)
        del content[part]
        torch.save(content, file)

    return damage


DAMAGE = {
    "empty": truncated_to(0),
    "of one byte": lambda file: os.truncate(file, 1),
    "half": truncated_to(0.5),
    "all but the end": truncated_to(0.999),
    "text": lambda file: file.write_text("this is no checkpoint"),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "another zip": lambda file: (
        shutil.make_archive(str(file), "zip", file.parent, "last_checkpoint")
        and os.replace(f"{file}.zip", file)
    ),
    "a flipped bit": with_flipped_bit,
    "without trainer": without("trainer"),
    "without model": without("model"),
    "a tensor": lambda file: torch.save(torch.zeros(3), file),
    "gone": os.remove,
}


@pytest.fixture
def three(run):
    for iteration in (1, 2, 3):
        run.save(iteration)
    return run


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_the_file_before_a_damaged_one_is_used_and_both_are_named(three, tmp_path, caplog, damage):
    damage(tmp_path / "model_0000003.pth")
    with caplog.at_level(logging.WARNING, logger=files.__name__):
        assert Run(tmp_path).resume() == 2
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "model_0000002.pth" in warning and "model_0000003.pth" in warning
    assert "\n" not in warning


def test_a_whole_file_is_resumed_from_without_a_warning(three, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert Run(tmp_path).resume() == 3
    assert not caplog.records


LAST = [None, b"", b"model_0000009.pth", b"\xff\x00\n", b"../x.pth", b"x" * 5000]


@pytest.mark.parametrize("content", LAST)
def test_without_a_last_checkpoint_the_newest_is_used(three, tmp_path, caplog, content):
    (tmp_path.parent / "x.pth").write_bytes((tmp_path / "model_0000001.pth").read_bytes())
    (tmp_path / "last_checkpoint").unlink()
    if content is not None:
        (tmp_path / "last_checkpoint").write_bytes(content)
    with caplog.at_level(logging.WARNING, logger=files.__name__):
        assert Run(tmp_path).resume() == 3
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "last_checkpoint" in warning and "model_0000003.pth" in warning


def test_one_can_go_back_by_naming_an_older_file(three, tmp_path):
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth\n")
    assert Run(tmp_path).resume() == 1


def test_which_file_is_newer_is_decided_by_the_iteration_in_it(three, tmp_path):
    """Not by its name: the best one and the final one have none."""
    three.save(2, "model_best")
    three.save(5, "model_final")
    (tmp_path / "last_checkpoint").unlink()
    assert Run(tmp_path).resume() == 5
    truncated_to(0.5)(tmp_path / "model_final.pth")
    assert Run(tmp_path).resume() == 3
    truncated_to(0.5)(tmp_path / "model_0000003.pth")
    assert Run(tmp_path).resume() == 2
    truncated_to(0.5)(tmp_path / "model_0000002.pth")
    assert Run(tmp_path).resume() == 2
    truncated_to(0.5)(tmp_path / "model_best.pth")
    assert Run(tmp_path).resume() == 1


def test_files_that_an_earlier_run_left_are_the_last_resort(run, tmp_path):
    for iteration in (8, 9, 1, 2):
        run.save(iteration)
    truncated_to(0.5)(tmp_path / "model_0000002.pth")
    assert Run(tmp_path).resume() == 1
    truncated_to(0.5)(tmp_path / "model_0000001.pth")
    assert Run(tmp_path).resume() == 9


def test_if_none_can_be_used_the_run_does_not_start_anew(three, tmp_path):
    for file in tmp_path.glob("*.pth"):
        truncated_to(0.5)(file)
    again = Run(tmp_path)
    assert again.checkpointer.has_checkpoint()
    with pytest.raises(UsageError, match="cannot resume in") as error:
        again.resume()
    for name in ("model_0000001.pth", "model_0000002.pth", "model_0000003.pth", "--resume"):
        assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_a_run_whose_files_are_all_gone_does_not_start_anew(run, tmp_path):
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    with pytest.raises(UsageError, match=r"names 'model_0000003\.pth', which does not exist"):
        run.resume()


def test_weights_that_lie_in_the_folder_are_no_run(run, tmp_path):
    torch.save({"model": {}}, tmp_path / "resnet50.pth")
    assert not run.checkpointer.has_checkpoint()
    assert run.resume() is None


def test_whichever_byte_is_wrong_no_wrong_weight_is_resumed_from(three, tmp_path):
    """Either the file before is used, or the byte meant nothing; `resume` looks at all weights."""
    file = tmp_path / "model_0000003.pth"
    content = file.read_bytes()
    places = random.Random(0).sample(range(len(content)), 60)
    found = []
    for place in places:
        file.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        found.append(Run(tmp_path).resume())
    assert set(found) <= {2, 3}
    assert found.count(2) > 50


def test_at_whatever_length_a_file_ends_it_is_noticed(three, tmp_path):
    file = tmp_path / "model_0000003.pth"
    content = file.read_bytes()
    for length in random.Random(0).sample(range(len(content)), 40):
        file.write_bytes(content[:length])
        assert Run(tmp_path).resume() == 2, length


# --- several processes ----------------------------------------------------------------------------


@pytest.fixture
def as_other_process(monkeypatch):
    """Takes part as a process that is told what the main one found."""

    def take_part(told):
        monkeypatch.setattr(comm, "is_main_process", lambda: False)
        monkeypatch.setattr(comm, "all_gather", lambda mine: [told if mine is None else True, mine])

    return take_part


def test_all_processes_load_what_the_main_one_found(three, tmp_path, as_other_process):
    as_other_process(tmp_path / "model_0000002.pth")
    assert Run(tmp_path).resume() == 2


def test_all_processes_end_when_the_main_one_finds_nothing(three, tmp_path, as_other_process):
    as_other_process(UsageError("cannot resume"))
    with pytest.raises(UsageError, match="cannot resume"):
        Run(tmp_path).resume()


def test_a_process_that_does_not_see_the_file_says_so(three, tmp_path, as_other_process):
    as_other_process(tmp_path / "elsewhere" / "model_0000002.pth")
    with pytest.raises(UsageError, match="a disk that all machines share"):
        Run(tmp_path).resume()


def resume_twice(folder):
    """What one of several processes resumes from, and is told once all files are damaged."""
    first = Run(folder).resume()
    comm.synchronize()
    if comm.is_main_process():
        for file in Path(folder).glob("*.pth"):
            truncated_to(0.5)(file)
    comm.synchronize()
    with pytest.raises(UsageError) as error:
        Run(folder).resume()
    Path(folder, f"process_{comm.get_rank()}").write_text(f"{first}, then {error.value}")


def test_two_processes_resume_from_the_same_file_or_end_alike(three, tmp_path, monkeypatch):
    truncated_to(0.5)(tmp_path / "model_0000003.pth")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    launch(resume_twice, 2, dist_url="auto", args=(str(tmp_path),))
    first, second = ((tmp_path / f"process_{rank}").read_text() for rank in range(2))
    assert first == second
    assert first.startswith("2, then cannot resume in")


# --- a full disk ----------------------------------------------------------------------------------


@contextmanager
def full_disk(limit=10_000):
    """No file of this process can grow beyond so many bytes: a real write that really fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("iteration", [3, 4], ids=["over an older one", "a new one"])
def test_on_a_full_disk_the_older_checkpoint_stays(three, tmp_path, caplog, iteration):
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


@pytest.mark.parametrize("failing", ["write", "fsync", "replace", "the name of the last one"])
@pytest.mark.parametrize("kind", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_whatever_fails_the_older_checkpoint_stays(
    three, tmp_path, monkeypatch, caplog, failing, kind
):
    calls = []

    def fail(*args, **kwargs):
        calls.append(args)
        if failing != "the name of the last one" or "last_checkpoint" in str(args[1:]):
            raise OSError(kind, os.strerror(kind))
        return replace(*args, **kwargs)

    replace = os.replace
    owner, name = {"write": (torch, "save"), "fsync": (os, "fsync")}.get(failing, (os, "replace"))
    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(owner, name, fail)
        assert not three.save(4)
    assert calls
    assert f"could not be saved: {os.strerror(kind)}" in caplog.text
    assert not list(tmp_path.glob("*.partial"))
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000003.pth"
    assert Run(tmp_path).resume() == 3


def test_a_folder_that_is_gone_does_not_end_training(three, tmp_path, caplog):
    shutil.rmtree(tmp_path)
    with caplog.at_level(logging.ERROR):
        assert not three.save(4)
    assert "there is has no checkpoint" in caplog.text


def test_without_its_final_checkpoint_a_training_is_no_success(three, tmp_path):
    with full_disk(), pytest.raises(UsageError, match=r"model_final\.pth could not be") as error:
        three.save(9, "model_final")
    assert "model_0000003.pth" in str(error.value) and "--resume" in str(error.value)
    assert Run(tmp_path).resume() == 3


def test_an_interrupted_write_leaves_nothing(three, tmp_path, monkeypatch):
    def interrupt(content, file):
        file.write(b"half")
        raise KeyboardInterrupt

    before = names_in(tmp_path)
    monkeypatch.setattr(torch, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        three.save(4)
    assert names_in(tmp_path) == before


def test_a_mistake_in_the_program_is_not_taken_for_a_full_disk(three):
    three.trainer.state_dict = lambda: {"iteration": (i for i in range(3))}
    with pytest.raises(TypeError, match="generator"):
        three.save(4)


# --- pruning --------------------------------------------------------------------------------------


def numbers_in(folder):
    return sorted(int(file.stem[6:]) for file in Path(folder).glob("model_0*.pth"))


@pytest.mark.parametrize(("keep", "left"), [(0, [0, 1, 2, 3, 4, 5]), (1, [5]), (3, [3, 4, 5])])
def test_the_newest_stay(tmp_path, keep, left):
    run = Run(tmp_path, keep)
    for iteration in range(6):
        run.save(iteration)
    assert numbers_in(tmp_path) == left
    assert Run(tmp_path).resume() == 5


def test_a_resumed_run_prunes_what_the_first_one_wrote(tmp_path):
    for iteration in range(6):
        run = Run(tmp_path, keep=2)
        run.resume()
        run.save(iteration)
    assert numbers_in(tmp_path) == [4, 5]


def test_the_best_the_final_and_other_files_stay(tmp_path):
    run = Run(tmp_path, keep=1)
    run.save(0, "model_best")
    run.save(1, "model_final")
    (tmp_path / "model_0000000_copy.pth").write_text("")
    (tmp_path / "model_zoo.pth").write_text("")
    before = set(names_in(tmp_path))
    for iteration in range(2, 6):
        run.save(iteration)
    assert set(names_in(tmp_path)) == before | {"model_0000005.pth"}


def test_the_best_one_is_no_reason_to_prune(tmp_path):
    run = Run(tmp_path, keep=2)
    run.save(1)
    run.save(2)
    run.save(2, "model_best")
    assert numbers_in(tmp_path) == [1, 2]
    assert Run(tmp_path).resume() == 2


def test_later_files_of_an_earlier_run_do_not_cost_the_new_ones(tmp_path):
    for iteration in (7, 8, 9):
        Run(tmp_path).save(iteration)
    run = Run(tmp_path, keep=2)
    for iteration in (1, 2, 3):
        run.save(iteration)
    assert numbers_in(tmp_path) == [2, 3, 7, 8, 9]


def test_nothing_is_deleted_for_a_file_that_was_not_written(tmp_path):
    run = Run(tmp_path, keep=2)
    for iteration in (1, 2):
        run.save(iteration)
    with full_disk():
        for iteration in (3, 4, 5):
            assert not run.save(iteration)
    assert numbers_in(tmp_path) == [1, 2]


def test_a_file_that_cannot_be_deleted_is_a_warning(tmp_path, caplog, monkeypatch):
    run = Run(tmp_path, keep=1)
    run.save(1)

    def fail(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(Path, "unlink", fail)
        assert run.save(2)
    assert "cannot delete" in caplog.text and "model_0000001.pth" in caplog.text


def test_a_negative_number_to_keep_is_an_error(tmp_path):
    with pytest.raises(UsageError, match=r"SOLVER\.KEEP_CHECKPOINTS is -1"):
        Run(tmp_path, keep=-1)
