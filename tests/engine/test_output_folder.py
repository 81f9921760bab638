"""OUTPUT_DIR: it is reserved, and a run in it is never replaced."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

import train_net
from locreweight.engine.output_folder import find_result, lock_output_dir, prepare_output_dir
from locreweight.errors import UsageError
from tests.engine.tiny_training import restored_loggers_and_signals, training_config

RUN = {
    "config.yaml": "a: 1",
    "metrics.json": '{"iteration": 1}\n',
    "run.json": "[]",
    "log.txt": "log",
    "last_checkpoint": "model_final.pth",
    "model_best.pth": "weights",
    "model_final.pth": "weights",
    "events.out.tfevents.1.host.2.0": "events",
    "panels/iter_0000001.jpg": "picture",
    "inference/ground_truth.json": "{}",
    "report.html": "report",
}


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def content_of(folder):
    """Relative path -> content, without the lock."""
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture
def run(tmp_path):
    return write(tmp_path / "run", RUN)


def prepare(folder, resume=False, overwrite=False, used_files=()):
    return prepare_output_dir(folder, resume=resume, overwrite=overwrite, used_files=used_files)


# --- refusal --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "result",
    [
        {"last_checkpoint": "model_0000001.pth"},
        {"model_best.pth": "weights"},
        {"model_final.pth": ""},  # damaged, but perhaps not lost
        {"model_0000009.pth": "weights"},
        {"model_resume.pth": "weights"},
        {"metrics.json": '{"iteration": 19}\n'},
        {"skipped_steps.jsonl": '{"iteration": 3}\n'},
    ],
    ids=lambda files: next(iter(files)),
)
def test_training_into_a_run_is_refused_and_changes_nothing(tmp_path, result):
    write(tmp_path, result)
    with pytest.raises(UsageError) as error:
        prepare(tmp_path)
    for word in (
        str(tmp_path),
        next(iter(result)),
        "--resume",
        "another OUTPUT_DIR",
        "--overwrite",
    ):
        assert word in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == set(result)
    assert content_of(tmp_path) == result


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"notes.txt": "mine", "images/a.jpg": "picture"},
        {"config.yaml": "a: 1", "log.txt": "log", "metrics.json": "", ".lock": ""},  # failed start
        {"model_weights.pth": "pretrained"},
        {"evaluation/metrics.json": "x"},
    ],
    ids=["empty", "other files", "failed start", "pretrained weights", "evaluation"],
)
@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"resume": True}])
def test_folder_without_results_is_used_as_it_is(tmp_path, files, flags):
    folder = write(tmp_path / "folder", files)
    assert prepare(folder, **flags) is None
    assert content_of(folder) == {n: text for n, text in files.items() if n != ".lock"}
    assert [path.name for path in tmp_path.iterdir()] == (["folder"])


def test_missing_folder_is_created_and_locked(tmp_path):
    assert prepare(tmp_path / "new/folder", overwrite=True) is None
    assert (tmp_path / "new/folder/.lock").is_file()


def test_record_of_a_start_without_results_is_replaced_unless_resumed(tmp_path):
    write(tmp_path, {"run.json": "[]"})
    prepare(tmp_path, resume=True)
    assert (tmp_path / "run.json").is_file()
    prepare(tmp_path)
    assert not (tmp_path / "run.json").exists()


def test_resume_keeps_the_run(run):
    assert prepare(run, resume=True) is None
    assert content_of(run) == RUN


# --- overwrite ------------------------------------------------------------------------------------


def test_overwrite_moves_the_run_to_a_free_name(run):
    write(run.with_name("run-old-1"), {"other": "kept"})
    moved = prepare(run, overwrite=True)
    assert moved == run.with_name("run-old-2")
    assert content_of(moved) == RUN
    assert content_of(run.with_name("run-old-1")) == {"other": "kept"}
    assert content_of(run) == {} and (run / ".lock").is_file()
    assert not find_result(run)


def test_overwrite_of_a_link_moves_the_folder_it_leads_to(run, tmp_path):
    (tmp_path / "link").symlink_to(run)
    assert prepare(tmp_path / "link", overwrite=True) == run.with_name("run-old-1")
    assert content_of(run) == {} and (tmp_path / "link").resolve() == run


@pytest.mark.parametrize("name", ["notes.txt", "images/a.jpg", "seed-2/config.yaml", "model.pth"])
def test_overwrite_does_not_move_other_files(run, name):
    write(run, {name: "mine"})
    with pytest.raises(UsageError, match=f"not of a run, such as '{name.split('/')[0]}'"):
        prepare(run, overwrite=True)
    assert content_of(run) == RUN | {name: "mine"}
    assert [path.name for path in run.parent.iterdir()] == ["run"]


def test_overwrite_does_not_move_files_of_the_new_training(run):
    with pytest.raises(
        UsageError, match=r"would move .*model_best\.pth', which this training uses"
    ):
        prepare(run, overwrite=True, used_files=["other.yaml", str(run / "model_best.pth")])
    assert content_of(run) == RUN


def test_overwrite_does_not_move_the_working_directory(run, monkeypatch):
    monkeypatch.chdir(run)
    with pytest.raises(UsageError, match="which this training uses"):
        prepare(Path("."), overwrite=True)
    assert content_of(run) == RUN


def test_overwrite_reports_a_folder_that_cannot_be_renamed(run, monkeypatch):
    def busy(*_):
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(Path, "rename", busy)
    with pytest.raises(UsageError, match="cannot rename .*busy.*use another OUTPUT_DIR"):
        prepare(run, overwrite=True)
    assert content_of(run) == RUN


def test_resume_and_overwrite_exclude_each_other(run):
    with pytest.raises(UsageError, match="use one of them"):
        prepare(run, resume=True, overwrite=True)
    assert content_of(run) == RUN


# --- lock -----------------------------------------------------------------------------------------

FORK = multiprocessing.get_context("fork")


def hold(folder, pipe):
    """Lock the folder, and start a worker that outlives this process if it is killed."""
    lock_output_dir(folder)
    worker = os.fork()
    if not worker:
        time.sleep(600)
        os._exit(0)
    pipe.send(worker)
    time.sleep(600)


def lock_error_of_other_process(folder):
    """The error of another process that locks the folder; empty if there is none."""

    def lock(pipe):
        # The fork has inherited the list of locks, but not the locks.
        pytest.MonkeyPatch().setattr("locreweight.engine.output_folder._locks", {})
        try:
            lock_output_dir(folder)
            pipe.send("")
        except UsageError as error:
            pipe.send(str(error))

    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=lock, args=(theirs,))
    process.start()
    process.join()
    assert ours.poll()
    return ours.recv()


@pytest.fixture
def other_training(tmp_path):
    """Another process with a worker, which has locked the folder."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=hold, args=(tmp_path, theirs))
    process.start()
    assert ours.poll(60)
    worker = ours.recv()
    yield process
    process.kill()
    process.join()
    os.kill(worker, signal.SIGKILL)


def test_lock_rejects_the_folder_of_another_training(other_training, tmp_path):
    with pytest.raises(UsageError, match=f"another training is writing to .*{tmp_path.name}"):
        lock_output_dir(tmp_path)
    lock_output_dir(tmp_path / "other")


def test_second_training_ends_before_it_writes(other_training, datasets, tmp_path):
    cfg = training_config(datasets, tmp_path)
    (tmp_path / "config").write_text(cfg.dump())
    arguments = train_net.argument_parser().parse_args(["--config-file", str(tmp_path / "config")])
    with restored_loggers_and_signals(), pytest.raises(SystemExit) as exit_:
        train_net.launch(train_net.main, arguments)
    assert exit_.value.code.startswith("error: another training is writing")
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "config"}


def test_lock_ends_with_its_process_although_a_worker_survives(other_training, tmp_path):
    other_training.kill()
    other_training.join()
    lock_output_dir(tmp_path)


def test_lock_can_be_repeated_and_still_holds(tmp_path):
    for _ in range(2):
        lock_output_dir(tmp_path / "new/folder")

    assert "another training" in lock_error_of_other_process(tmp_path / "new/folder")


def test_lock_warns_on_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.lockf", unsupported)
    lock_output_dir(tmp_path)
    assert "cannot check whether another training" in caplog.text


def test_overwrite_does_not_move_the_run_of_another_training(other_training, tmp_path):
    write(tmp_path, RUN)
    with pytest.raises(UsageError, match="another training is writing"):
        prepare(tmp_path, overwrite=True)
    assert content_of(tmp_path) == RUN


def test_new_folder_is_locked_after_overwrite(run):
    prepare(run, overwrite=True)
    assert "another training" in lock_error_of_other_process(run)
