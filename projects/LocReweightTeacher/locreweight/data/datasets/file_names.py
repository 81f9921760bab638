"""Names of files that somebody else has written down: in an annotation file, or on the disk."""

from __future__ import annotations

import os

from ...errors import UsageError


def printable_name(name: str) -> str:
    """A name as messages show it: in one line, and in letters that any log can take."""
    return name if name.isprintable() else ascii(name)


def check_inside(name: str, written_in: str, folder: str, *, allow_outside: bool) -> None:
    """A name from an annotation file is that of a file in its folder.

    It is judged as it is written: absolute names and names with ``..`` lead outside. Symbolic links
    in the folder are followed, as whoever put them there wants it.

    Args:
        name: relative to ``folder``.
        written_in: the annotation file.
        folder: where the named files are to lie.
        allow_outside: ``DATASETS.CHECKS.ALLOW_OUTSIDE_PATHS``.

    Raises:
        UsageError: names the annotation file and the name.
    """
    if not name.strip() or "\0" in name or not _is_encodable(name):
        raise UsageError(f"{printable_name(written_in)} names the file {name!r}, which can be none")
    if not allow_outside and (os.path.isabs(name) or ".." in name.split(os.sep)):
        raise UsageError(
            f"{printable_name(written_in)} names {printable_name(name)}, which may lie outside of {printable_name(folder)}; "
            "if you trust that file, allow it with DATASETS.CHECKS.ALLOW_OUTSIDE_PATHS True"
        )


def _is_encodable(name: str) -> bool:
    try:
        os.fsencode(name)
    except UnicodeEncodeError:  # json can hold halves of characters
        return False
    return True
