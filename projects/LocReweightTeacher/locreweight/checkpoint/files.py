"""Checkpoint files of a run: list them, find an intact one to resume from, delete old ones.

The file ``last_checkpoint`` holds the name of the newest checkpoint. All files are written
atomically (:mod:`locreweight.file_io`), so a name in the folder always refers to a complete file.
"""

from __future__ import annotations

import logging
import re
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch

from ..errors import UsageError
from ..file_io import PARTIAL_SUFFIX
from ..run_files import BEST_CHECKPOINT, FINAL_CHECKPOINT, LAST_CHECKPOINT
from .safe_loading import short_reason

logger = logging.getLogger(__name__)

_PERIODIC = re.compile(r"model_(\d{7,})\.pth")


class DamagedCheckpoint(Exception):
    """A checkpoint that cannot be resumed from; the message is the reason."""


def remove_partial_files(folder: Path) -> None:
    """Remove files that a killed run did not finish writing."""
    for name in ("model*.pth", LAST_CHECKPOINT):
        for file in folder.glob(name + PARTIAL_SUFFIX):
            file.unlink(missing_ok=True)
            logger.info("removed the incomplete file %s of a run that was killed", file)


def prune(folder: Path, written: str, keep: int) -> None:
    """Delete the oldest periodic checkpoints, but never the best, final or newest one.

    Args:
        folder: folder of the checkpoints.
        written: name of the file that was just written. Periodic checkpoints of later iterations
            belong to an earlier run in the same folder and are not deleted.
        keep: number of periodic checkpoints to keep; 0 keeps all.
    """
    newest = _iteration_in_name(written)
    if newest is None or keep == 0:
        return
    iterations = {file: _iteration_in_name(file.name) for file in folder.glob("model_*.pth")}
    own = {file: i for file, i in iterations.items() if i is not None and i <= newest}
    for file in sorted(own, key=lambda file: own[file])[:-keep]:
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("cannot delete the old checkpoint %s: %s", file, error.strerror)


def free_space(folder: Path) -> str:
    """Free space of the disk that holds a folder, for messages."""
    try:
        return f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB free"
    except OSError as error:
        return f"free space unknown, {error.strerror}"


def last_checkpoint(folder: Path) -> str | None:
    """Content of ``last_checkpoint``: the name of the newest checkpoint; None without that file."""
    try:
        return (folder / LAST_CHECKPOINT).read_bytes().decode(errors="replace").strip()
    except FileNotFoundError:
        return None


def choose_checkpoint(folder: Path, *, last: bool = False) -> Path:
    """Return the checkpoint of a run that tools use: the best one, or the last one.

    Args:
        folder: ``OUTPUT_DIR`` of the run.
        last: return the last one. Without evaluations, there is no best one, and the last one is
            always returned.

    Raises:
        UsageError: if the folder has no checkpoint.
    """
    best, final = folder / BEST_CHECKPOINT, folder / FINAL_CHECKPOINT
    if best.is_file() and not last:
        return best
    newest = last_checkpoint(folder)
    if newest is None:
        raise UsageError(
            f"the folder {folder} has no checkpoint: use a checkpoint or the OUTPUT_DIR of a run"
        )
    # The newest one can be the best, or one to resume from, written after the final one.
    return final if final.is_file() else folder / newest


def list_checkpoints(folder: Path) -> list[Path]:
    """All checkpoint files of a run, intact or damaged."""
    files = set(folder.glob("model_*.pth"))
    last = last_checkpoint(folder)
    if last:  # compared by name, since a damaged file could hold a path to somewhere else
        files |= {file for file in folder.iterdir() if file.name == last}
    return sorted(file for file in files if file.is_file())


def find_intact_checkpoint(folder: Path, parts: Iterable[str]) -> Path | None:
    """Find the checkpoint to resume from: the last one or, if it is damaged, an earlier one.

    The checksums of the returned file have been verified. Skipped files are named in a warning.

    Args:
        folder: folder of the checkpoints.
        parts: entries that the checkpoint must have, such as ``trainer``.

    Returns:
        None if the folder has no checkpoint.

    Raises:
        UsageError: if the folder has or had checkpoints, but none can be resumed from.
    """
    files, last = list_checkpoints(folder), last_checkpoint(folder)
    if not files and last is None:
        return None
    named = [file for file in files if file.name == last]
    skipped = [] if named else [f"{LAST_CHECKPOINT} ({_problem_of_last_checkpoint(last)})"]
    others = [file for file in files if file not in named]
    for candidates in (named, others):
        for file in _newest_first(candidates, parts, skipped, _iteration_in_name(last or "")):
            try:
                _verify_checksums(file)
            except DamagedCheckpoint as error:
                skipped.append(f"{file.name} ({error})")
                continue
            if skipped:
                logger.warning(
                    "resuming from %s, because other checkpoints in %s cannot be used: %s",
                    file.name,
                    folder,
                    "; ".join(skipped),
                )
            return file
    raise UsageError(
        f"cannot resume in {folder}: no checkpoint there can be used: {'; '.join(skipped)}. Put an "
        "intact checkpoint there, or leave out --resume to start from the beginning"
    )


def iteration_of(file: Path, parts: Iterable[str]) -> int:
    """Last iteration done before a checkpoint was written. Tensors are not read.

    Args:
        file: a checkpoint.
        parts: entries that the checkpoint must have.

    Raises:
        DamagedCheckpoint: if the file cannot be read without unpickling objects, or lacks a part.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        missing = [part for part in parts if part not in content]
        if not missing:
            return int(content["trainer"]["iteration"])
    except Exception as error:  # a damaged file can raise almost anything
        raise DamagedCheckpoint(short_reason(error)) from error
    raise DamagedCheckpoint(f"lacks {', '.join(missing)}")


def _iteration_in_name(name: str) -> int | None:
    match = _PERIODIC.fullmatch(name)
    return int(match[1]) if match else None


def _problem_of_last_checkpoint(last: str | None) -> str:
    if last is None:
        return "is missing"
    return f"names {last[:80]!r}, which does not exist" if last else "is empty"


def _newest_first(
    files: list[Path], parts: Iterable[str], skipped: list[str], limit: int | None
) -> list[Path]:
    """Sort readable checkpoints by iteration; unreadable ones are added to ``skipped``.

    Files of iterations after ``limit`` come last, since they may belong to an earlier run.
    """
    order = {}
    for file in files:
        try:
            iteration = iteration_of(file, parts)
        except DamagedCheckpoint as error:
            skipped.append(f"{file.name} ({error})")
        else:
            within_limit = limit is None or iteration <= limit
            order[file] = (within_limit, iteration, file.stat().st_mtime_ns)
    return sorted(order, key=lambda file: order[file], reverse=True)


def _verify_checksums(file: Path) -> None:
    """Read the whole file. PyTorch writes checksums, but does not verify them."""
    try:
        with zipfile.ZipFile(file) as archive:
            bad = archive.testzip()
    except Exception as error:  # a damaged file can raise almost anything
        raise DamagedCheckpoint(short_reason(error)) from error
    if bad:
        raise DamagedCheckpoint(f"its entry {bad} is damaged")
