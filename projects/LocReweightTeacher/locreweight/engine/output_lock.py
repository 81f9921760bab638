"""One training at a time writes into a folder."""

from __future__ import annotations

import fcntl
import logging
from pathlib import Path
from typing import TextIO

from ..errors import UsageError

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
_held: dict[Path, TextIO] = {}


def lock_output_dir(folder: Path) -> None:
    """Keep the trainings of other processes out of a folder until this one ends, however it does.

    Args:
        folder: ``OUTPUT_DIR``; made if it is not there.

    Raises:
        UsageError: if another process has claimed it.
        OSError: if it cannot be written into.
    """
    folder = folder.resolve()
    if folder in _held:
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / LOCK_FILE).open("w")
    try:
        # A lock that is this process's alone: its loaders' workers may outlive it for a while.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise UsageError(
            f"another training is writing into OUTPUT_DIR {str(folder)!r}: stop it, wait for its "
            "end, or name another folder"
        ) from None
    except OSError as error:  # a file system that knows no locks
        logger.warning("cannot see whether another training writes into %s: %s", folder, error)
    _held[folder] = file
