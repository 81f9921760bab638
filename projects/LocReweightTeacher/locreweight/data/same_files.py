"""Which images are the same file, found without asking the disk for every single one."""

from __future__ import annotations

import os
from functools import cache

from .image_files import ImageFiles


class RealPaths:
    """``os.path.realpath`` for many files of the same folders.

    Each folder is resolved once, and listed once to know the links in it. What was seen is
    remembered: one is made for each time of looking.
    """

    def __init__(self) -> None:
        self._real_folder = cache(os.path.realpath)
        self._links = cache(_links)

    def __call__(self, path: str) -> str:
        """The path without links; of one that leads nowhere, as far as it leads."""
        folder, name = self._place(path)
        if not self._leads_on(folder, name):
            return os.path.join(folder, name)
        try:
            target = os.readlink(os.path.join(folder, name))
        except OSError:  # no link, or none any more
            return os.path.realpath(path)
        place = self._place(os.path.join(folder, target))
        # Links to links are rare, and may lead in circles.
        return os.path.realpath(path) if self._leads_on(*place) else os.path.join(*place)

    def among(self, known: set[str], images: ImageFiles) -> list[int]:
        """Which images are files that are known, by their real paths."""
        homes = {os.path.dirname(path) for path in known}
        # No file of a folder without links and without known files can be one.
        suspects = [self._may_hold(folder, homes) for folder in images.folders]
        return [i for i in images.in_folders(suspects) if self(images[i]["file_name"]) in known]

    def _may_hold(self, folder: str, homes: set[str]) -> bool:
        real, _ = self._place(folder)
        return real in homes or self._links(real) != frozenset()

    def _place(self, path: str) -> tuple[str, str]:
        folder, slash, name = path.rpartition("/")
        return self._real_folder(folder or slash or "."), name

    def _leads_on(self, folder: str, name: str) -> bool:
        if name in ("", ".", ".."):
            return True
        links = self._links(folder)
        return os.path.islink(os.path.join(folder, name)) if links is None else name in links


def _links(folder: str) -> frozenset[str] | None:
    """Names of the symbolic links in a folder; unknown if it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries if entry.is_symlink())
    except FileNotFoundError:
        return frozenset()
    except OSError:  # one may open files of a folder that one may not list
        return None
