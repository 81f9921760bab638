"""The files of a run's checkpoints: written whole, found again, pruned.

At any moment, whatever ends the process, a name in the folder holds a whole file: new content is
written beside it under another name first. ``last_checkpoint`` holds the name of the newest one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import torch

from ..errors import UsageError
from .safe_loading import short_reason

logger = logging.getLogger(__name__)

LAST_CHECKPOINT = "last_checkpoint"
_PARTIAL = ".partial"
_PERIODIC = re.compile(r"model_(\d{7,})\.pth")


class DamagedCheckpoint(Exception):
    """Says in a few words why a file cannot be resumed from."""


# -- writing ---------------------------------------------------------------------------------------


def atomic_write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Give a file new content, all of it or none.

    Args:
        path: its folder is there.
        write: writes the content into a file.

    Raises:
        OSError: if it cannot be written; what was there before stays.
    """
    partial = path.with_name(path.name + _PARTIAL)
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # a file that is left over goes at the next start
            partial.unlink(missing_ok=True)
        # torch.save hides why a file could not be written behind an error of its own.
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    _sync_folder(path.parent)


def atomic_write_bytes(path: Path, content: bytes) -> None:
    """The same with content that is there already."""
    atomic_write(path, lambda file: file.write(content))


def _sync_folder(folder: Path) -> None:
    """Has the new name survive a loss of power, where the file system knows how to."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_partial_files(folder: Path) -> None:
    """Remove what a run that was killed had begun to write."""
    for name in ("model*.pth", LAST_CHECKPOINT):
        for file in folder.glob(name + _PARTIAL):
            file.unlink(missing_ok=True)
            logger.info("removed %s, which a run that was killed did not complete", file)


def prune(folder: Path, written: str, keep: int) -> None:
    """Delete the oldest periodic checkpoints; never the best, the final or the newest one.

    Args:
        folder: of the checkpoints.
        written: name of the file just written. Periodic files of later iterations are those of an
            earlier run in the same folder, and stay.
        keep: number of periodic checkpoints that stay; 0 keeps all.
    """
    newest = _number_of(written)
    if newest is None or keep == 0:
        return
    numbers = {file: _number_of(file.name) for file in folder.glob("model_*.pth")}
    known = {file: n for file, n in numbers.items() if n is not None and n <= newest}
    for file in sorted(known, key=lambda file: known[file])[:-keep]:
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("cannot delete the old checkpoint %s: %s", file, error.strerror)


def _number_of(name: str) -> int | None:
    match = _PERIODIC.fullmatch(name)
    return int(match[1]) if match else None


def free_space(folder: Path) -> str:
    """Of the disk that a folder lies on, in words."""
    try:
        return f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB free"
    except OSError as error:
        return f"free space unknown, {error.strerror}"


# -- finding again ---------------------------------------------------------------------------------


def last_checkpoint(folder: Path) -> str | None:
    """The name that ``last_checkpoint`` holds, if there is this file."""
    try:
        return (folder / LAST_CHECKPOINT).read_bytes().decode(errors="replace").strip()
    except FileNotFoundError:
        return None


def list_checkpoints(folder: Path) -> list[Path]:
    """All files that could be checkpoints of a run, damaged or not."""
    found = set(folder.glob("model_*.pth"))
    last = last_checkpoint(folder)
    if last:  # compared and not looked up: it may be no name at all, or lead out of the folder
        found |= {file for file in folder.iterdir() if file.name == last}
    return sorted(file for file in found if file.is_file())


def find_intact_checkpoint(folder: Path, parts: Iterable[str]) -> Path | None:
    """The file to resume from: the one ``last_checkpoint`` names or, if that fails, one before it.

    All bytes of the file were read and their checksums are right. Whatever was passed over is
    named in a warning.

    Args:
        folder: of the checkpoints.
        parts: what the file has to hold, such as ``trainer``.

    Returns:
        None if the folder holds no checkpoint at all.

    Raises:
        UsageError: if it holds some, or did, but none can be resumed from.
    """
    files, last = list_checkpoints(folder), last_checkpoint(folder)
    if not files and last is None:
        return None
    named = [file for file in files if file.name == last]
    passed_over = [] if named else [f"{LAST_CHECKPOINT} ({_why_unusable(last)})"]
    others = [file for file in files if file not in named]
    for candidates in (named, others):
        for file in _newest_first(candidates, parts, passed_over, _number_of(last or "")):
            try:
                _check_all_bytes(file)
            except DamagedCheckpoint as error:
                passed_over.append(f"{file.name} ({error})")
                continue
            if passed_over:
                logger.warning(
                    "resuming from %s, since these in %s cannot be used: %s",
                    file.name,
                    folder,
                    "; ".join(passed_over),
                )
            return file
    raise UsageError(
        f"cannot resume in {folder}, nothing there can be used: {'; '.join(passed_over)}. Put a "
        "whole checkpoint there, or leave out --resume to start anew"
    )


def _why_unusable(last: str | None) -> str:
    if last is None:
        return "is missing"
    return f"names {last[:80]!r}, which is not there" if last else "is empty"


def _newest_first(
    files: list[Path], parts: Iterable[str], passed_over: list[str], limit: int | None
) -> list[Path]:
    """Files of later iterations than the limit come last: an earlier run may have left them."""
    order = {}
    for file in files:
        try:
            iteration = iteration_of(file, parts)
        except DamagedCheckpoint as error:
            passed_over.append(f"{file.name} ({error})")
        else:
            before = limit is None or iteration <= limit
            order[file] = (before, iteration, file.stat().st_mtime_ns)
    return sorted(order, key=lambda file: order[file], reverse=True)


def iteration_of(file: Path, parts: Iterable[str]) -> int:
    """The last iteration done when a checkpoint was written; reads its structure, not its tensors.

    Raises:
        DamagedCheckpoint: if it cannot be read as tensors only, or lacks a part.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        missing = [part for part in parts if part not in content]
        if not missing:
            return int(content["trainer"]["iteration"])
    except Exception as error:  # whatever a damaged file makes the reader raise
        raise DamagedCheckpoint(short_reason(error)) from error
    raise DamagedCheckpoint(f"lacks {', '.join(missing)}")


def _check_all_bytes(file: Path) -> None:
    """PyTorch writes checksums and never looks at them."""
    try:
        with zipfile.ZipFile(file) as archive:
            bad = archive.testzip()
    except Exception as error:  # whatever a damaged file makes the reader raise
        raise DamagedCheckpoint(short_reason(error)) from error
    if bad:
        raise DamagedCheckpoint(f"{bad} in it is damaged")
