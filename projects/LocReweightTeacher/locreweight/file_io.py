"""Atomic writes and checksums of local files."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

PARTIAL_SUFFIX = ".partial"


def atomic_write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replace the content of a file completely or not at all, even if the process is killed.

    Args:
        path: the file; its folder must exist.
        write: writes the content to an open binary file.

    Raises:
        OSError: if the file cannot be written; its previous content is kept.
    """
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the next start removes partial files
            partial.unlink(missing_ok=True)
        # torch.save raises a RuntimeError that hides the cause.
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    _sync_folder(path.parent)


def atomic_write_bytes(path: Path, content: bytes) -> None:
    """Call :func:`atomic_write` with the given content."""
    atomic_write(path, lambda file: file.write(content))


def sha256_of(file: str | Path) -> str:
    """SHA-256 of a file's content as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make a new file name survive a power failure, if the file system supports it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
