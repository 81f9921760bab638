"""File names from annotation files and folders: checks, and their form in messages."""

from __future__ import annotations

import os

from ...errors import UsageError


def printable_name(name: str) -> str:
    """A file name for messages: on one line and in characters that every log can hold."""
    return name if name.isprintable() else ascii(name)


def check_inside(name: str, index_file: str, folder: str, *, allow_outside: bool) -> None:
    """Check that a file name from an annotation file stays in the image folder.

    Only the name counts: absolute names and names with ``..`` may lead outside. Symbolic links in
    the folder are followed.

    Args:
        name: relative to ``folder``.
        index_file: the annotation file or list that contains the name.
        folder: the image folder.
        allow_outside: ``DATASETS.CHECKS.ALLOW_OUTSIDE_PATHS``.

    Raises:
        UsageError: names the annotation file and the name.
    """
    if not name.strip() or "\0" in name or not _is_encodable(name):
        raise UsageError(
            f"{printable_name(index_file)} contains {name!r}, which cannot be a file name"
        )
    if not allow_outside and (os.path.isabs(name) or ".." in name.split(os.sep)):
        raise UsageError(
            f"{printable_name(index_file)} contains {printable_name(name)}, which may lie outside "
            f"of {printable_name(folder)}. If you trust the file, set "
            "DATASETS.CHECKS.ALLOW_OUTSIDE_PATHS True"
        )


def _is_encodable(name: str) -> bool:
    try:
        os.fsencode(name)
    except UnicodeEncodeError:  # json can contain lone surrogates
        return False
    return True
