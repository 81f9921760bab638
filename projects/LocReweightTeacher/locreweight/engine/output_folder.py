"""The ``OUTPUT_DIR`` of a training run: reserving it, and never mixing two runs in it."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from detectron2.utils import comm

from ..errors import UsageError
from ..run_files import (
    LAST_CHECKPOINT,
    LOCK_FILE,
    METRICS_FILE,
    RUN_FILE,
    SKIPPED_STEPS_FILE,
    is_checkpoint_of_run,
    is_written_by_run,
)

logger = logging.getLogger(__name__)

_locks: dict[Path, TextIO] = {}  # folder -> its locked file, open until the process ends


def prepare_output_dir(
    folder: Path, *, resume: bool, overwrite: bool, used_files: Sequence[str] = ()
) -> Path | None:
    """Reserve an output folder for a run; call it on all processes before they write to it.

    Args:
        folder: ``OUTPUT_DIR``; created if missing.
        resume: continue the run in the folder, if there is one.
        overwrite: move a run in the folder aside, together with the folder.
        used_files: files that this training reads.

    Returns:
        where an earlier run was moved to; None if none was moved.

    Raises:
        UsageError: on all processes, if the folder holds the results of a run and neither flag is
            given, if the run cannot be moved, or if another process has reserved the folder.
        OSError: if the folder is not writable.
    """
    outcome: Path | Exception | None = None
    if comm.is_main_process():
        try:
            outcome = _prepare(folder, resume, overwrite, used_files)
        except (UsageError, OSError) as error:
            outcome = error
    # Others wait: they would write their logs into the run that is being moved.
    outcome = comm.all_gather(outcome)[0]
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _prepare(folder: Path, resume: bool, overwrite: bool, used_files: Sequence[str]) -> Path | None:
    if resume and overwrite:
        raise UsageError(
            "--resume continues the run in OUTPUT_DIR and --overwrite moves it aside: use one of "
            "them"
        )
    result = find_result(folder)
    if result and not (resume or overwrite):
        raise UsageError(
            f"OUTPUT_DIR {str(folder)!r} holds a run with {result}, which a new training would "
            "replace: continue it with --resume, use another OUTPUT_DIR, or move it aside with "
            "--overwrite"
        )
    lock_output_dir(folder)
    if result and overwrite:
        return _move_aside(folder.resolve(), used_files)
    if not resume:
        (folder / RUN_FILE).unlink(missing_ok=True)  # of a start that left no result
    return None


def find_result(folder: Path) -> str:
    """Name of a file with results of a run: a checkpoint or its metrics; empty if there is none.

    What a start leaves that failed before its first iterations does not count.
    """
    if not folder.is_dir():
        return ""
    names = sorted(path.name for path in folder.iterdir())
    checkpoints = [name for name in names if is_checkpoint_of_run(name)]
    if checkpoints or LAST_CHECKPOINT in names:
        return (checkpoints or [LAST_CHECKPOINT])[0]
    records = (METRICS_FILE, SKIPPED_STEPS_FILE)
    return next((n for n in records if n in names and (folder / n).stat().st_size), "")


def _move_aside(folder: Path, used_files: Sequence[str]) -> Path:
    """Rename a folder that is locked, and create and lock an empty one in its place."""
    foreign = sorted(path.name for path in folder.iterdir() if not is_written_by_run(path.name))
    if foreign:
        raise UsageError(
            f"--overwrite would move {len(foreign)} files or folders of OUTPUT_DIR "
            f"{str(folder)!r} that are not of a run, such as {foreign[0]!r}: move them out of it, "
            "or use another OUTPUT_DIR"
        )
    used = [str(Path.cwd()), *used_files]
    inside = [path for path in used if Path(path).resolve().is_relative_to(folder)]
    if inside:
        raise UsageError(
            f"--overwrite would move {inside[0]!r}, which this training uses: use another "
            "OUTPUT_DIR, or copy it elsewhere and use the copy"
        )
    number = 1
    while (target := folder.with_name(f"{folder.name}-old-{number}")).exists():
        number += 1
    try:
        folder.rename(target)
    except OSError as error:
        raise UsageError(
            f"--overwrite cannot rename OUTPUT_DIR {str(folder)!r} to {str(target)!r} "
            f"({error.strerror}): use another OUTPUT_DIR"
        ) from error
    _locks.pop(folder).close()
    lock_output_dir(folder)
    return target


def lock_output_dir(folder: Path) -> None:
    """Reserve an output folder for this process until it ends.

    Args:
        folder: ``OUTPUT_DIR``; created if missing.

    Raises:
        UsageError: if another process has reserved it.
        OSError: if it is not writable.
    """
    folder = folder.resolve()
    if folder in _locks:
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / LOCK_FILE).open("w")
    try:
        # lockf locks belong to the process alone. Loader workers that outlive it do not hold them.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise UsageError(
            f"another training is writing to OUTPUT_DIR {str(folder)!r}: stop it, wait for it to "
            "finish, or use another folder"
        ) from None
    except OSError as error:  # the file system does not support locks
        logger.warning("cannot check whether another training writes to %s: %s", folder, error)
    _locks[folder] = file
