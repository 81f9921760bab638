"""Which paths lead to the same file, found without asking the disk for every single one."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache


class RealPaths:
    """``os.path.realpath`` for many files of the same folders.

    Each folder is resolved once, and listed once to know the links in it: for as many files as
    these lists are long, that takes a call to the disk for some hundred of them. What it has seen
    it remembers, so one is made for each time of looking.
    """

    def __init__(self) -> None:
        self._real_folder = cache(os.path.realpath)
        self._is_link = cache(_link_test)

    def __call__(self, path: str) -> str:
        """The path without links; of one that leads nowhere, as far as it leads."""
        place = self._place(path)
        if not self._leads_on(*place):
            return os.path.join(*place)
        try:
            target = os.readlink(os.path.join(*place))
        except OSError:  # replaced meanwhile
            return os.path.realpath(path)
        place = self._place(os.path.join(place[0], target))
        # Links to links are rare, and may lead in circles.
        return os.path.realpath(path) if self._leads_on(*place) else os.path.join(*place)

    def _place(self, path: str) -> tuple[str, str]:
        folder, slash, name = path.rpartition("/")
        return self._real_folder(folder or slash or "."), name

    def _leads_on(self, folder: str, name: str) -> bool:
        return name in ("", ".", "..") or self._is_link(folder)(name)


def _link_test(folder: str) -> Callable[[str], bool]:
    """Whether a name in a folder is that of a symbolic link."""
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries if entry.is_symlink()).__contains__
    except OSError:  # one may open files of a folder that one may not list
        return lambda name: os.path.islink(os.path.join(folder, name))
