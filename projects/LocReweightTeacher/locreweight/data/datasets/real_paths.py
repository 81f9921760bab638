"""Real paths of many files, to find images that two data sets have in common."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from itertools import compress

import numpy as np

from .packed_records import ImageFiles


class RealPathCache:
    """``os.path.realpath`` for many files, with a few calls per folder instead of per file.

    Each folder is resolved once, and listed once to find the symbolic links in it. Results are
    cached, so use an instance only as long as the folders do not change.
    """

    def __init__(self) -> None:
        self._real_folder = cache(os.path.realpath)
        self._links = cache(_list_links)

    def __call__(self, path: str) -> str:
        """Resolve the symbolic links of a path; for broken links, as far as possible."""
        folder, name = self._split(path)
        if not self._may_be_link(folder, name):
            return os.path.join(folder, name)
        try:
            target = os.readlink(os.path.join(folder, name))
        except OSError:  # not a link
            return os.path.realpath(path)
        target_path = self._split(os.path.join(folder, target))
        # Links to links are rare, and can form cycles.
        if self._may_be_link(*target_path):
            return os.path.realpath(path)
        return os.path.join(*target_path)

    def find(self, real_paths: set[str], images: ImageFiles) -> list[int]:
        """Indices of the images whose real path is in a set."""
        homes = {os.path.dirname(path) for path in real_paths}
        # A folder without links that is not the home of such a file cannot contain one.
        candidates = [self._may_contain(folder, homes) for folder in images.folders]
        return [
            i for i in images.in_folders(candidates) if self(images[i]["file_name"]) in real_paths
        ]

    def find_repeats(self, images: ImageFiles) -> list[int]:
        """Indices of the images whose real path is that of an earlier image.

        Of paths, only hashes are in memory, and those of repeated images.
        """
        hashes = np.fromiter(map(hash, self._encoded(images)), np.int64)
        ordered = np.sort(hashes)
        is_candidate = np.isin(hashes, ordered[1:][ordered[1:] == ordered[:-1]])
        if not is_candidate.any():
            return []
        known: set[bytes] = set()
        repeats = []
        for i, path in compress(enumerate(self._encoded(images)), is_candidate):
            if path in known:
                repeats.append(i)
            known.add(path)
        return repeats

    def _encoded(self, images: ImageFiles) -> Iterator[bytes]:
        """The real path of each image."""
        folders = images.folders
        reals = [self._split(folder)[0] for folder in folders]
        may_have_links = [self._links(real) != frozenset() for real in reals]
        starts = [os.fsencode(os.path.join(real, "")) for real in reals]
        for folder, name in images.entries():
            if may_have_links[folder]:
                yield os.fsencode(self(folders[folder] + os.fsdecode(name)))
            else:
                yield starts[folder] + name

    def _may_contain(self, folder: str, homes: set[str]) -> bool:
        real, _ = self._split(folder)
        return real in homes or self._links(real) != frozenset()

    def _split(self, path: str) -> tuple[str, str]:
        folder, slash, name = path.rpartition("/")
        return self._real_folder(folder or slash or "."), name

    def _may_be_link(self, folder: str, name: str) -> bool:
        if name in ("", ".", ".."):
            return True
        links = self._links(folder)
        return os.path.islink(os.path.join(folder, name)) if links is None else name in links


def _list_links(folder: str) -> frozenset[str] | None:
    """Names of the symbolic links in a folder; None if the folder cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries if entry.is_symlink())
    except FileNotFoundError:
        return frozenset()
    except OSError:  # files of a folder can be readable although the folder cannot be listed
        return None
