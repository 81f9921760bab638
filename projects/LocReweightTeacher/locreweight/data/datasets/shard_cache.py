"""Local copies of remote shards: downloads, checksums, retries and a bounded size."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ...errors import UsageError
from ...file_io import PARTIAL_SUFFIX

logger = logging.getLogger(__name__)

ATTEMPTS = 5
FIRST_PAUSE = 0.5  # seconds before the second attempt; doubles with each
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class ShardFile:
    """A file of an index: its URL or path, size in bytes, and SHA-256."""

    url: str
    size: int
    sha256: str


def is_local(url: str) -> bool:
    """Whether a URL is a path of this machine."""
    return "://" not in url


def open_url(url: str) -> contextlib.AbstractContextManager[BinaryIO]:
    """Open a local or remote file for reading.

    Raises:
        UsageError: if a package for the kind of storage is not installed.
    """
    if is_local(url):
        return open(url, "rb")
    try:
        import fsspec  # only needed for remote files

        return fsspec.open(url, "rb")
    except ImportError as error:
        raise UsageError(
            f"{url} needs a package that is not installed ({error}): pip install "
            "'locreweight[shards]', and gcsfs for gs://"
        ) from error


class ShardCache:
    """Files of remote URLs in a local folder, which processes may share.

    A file is complete once it has its name. A lock per file lets only one process download it. The
    files that were opened least recently are removed when the folder exceeds its size, but only
    tar files. A removed file stays readable where it is open.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """
        Args:
            folder: created when the first file is downloaded.
            max_bytes: size of all files; at least one is kept.
        """
        self.folder = folder
        self.max_bytes = max_bytes
        self._requested: tuple[str, ...] = ()

    def open(self, file: ShardFile) -> BinaryIO:
        """Open a file for reading, after downloading it if necessary.

        Raises:
            OSError: if it cannot be read, or all attempts to download it failed; names the URL.
        """
        if is_local(file.url):
            return open(file.url, "rb")
        path = self._path(file)
        with self._locked(path, wait=True):
            while True:
                # Another process may remove the file before it is open.
                with contextlib.suppress(FileNotFoundError):
                    opened = open(path, "rb")  # noqa: SIM115, the caller closes it
                    os.utime(opened.fileno())
                    return opened
                self._download(file, path)

    def local_path(self, file: ShardFile) -> Path:
        """Path of a file that stays in the folder, after downloading it if necessary."""
        with self.open(file):
            return Path(file.url) if is_local(file.url) else self._path(file)

    def prefetch(self, files: Sequence[ShardFile]) -> None:
        """Download files in a background thread, if they are not those of the last call."""
        urls = tuple(file.url for file in files)
        if urls == self._requested:
            return
        self._requested = urls
        missing = [f for f in files if not is_local(f.url) and not self._path(f).exists()]
        if missing:
            threading.Thread(target=self._download_all, args=(missing,), daemon=True).start()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_requested": ()}

    def _path(self, file: ShardFile) -> Path:
        return self.folder / (file.sha256 + Path(file.url).suffix)

    def _download_all(self, files: Sequence[ShardFile]) -> None:
        for file in files:
            path = self._path(file)
            with self._locked(path, wait=False) as is_locked:  # another process downloads it
                if is_locked and not path.exists():
                    try:
                        self._download(file, path)
                    except OSError as error:  # reported when the file is needed
                        logger.debug("prefetching: %s", error)

    def _download(self, file: ShardFile, path: Path) -> None:
        pause = FIRST_PAUSE
        for attempt in range(1, ATTEMPTS + 1):
            try:
                self._make_room(file.size)
                _copy(file, path)
                return
            except UsageError:
                raise
            except Exception as error:  # each kind of storage has its own exceptions
                problem = f"{type(error).__name__}: {error}"
                if attempt == ATTEMPTS:
                    raise OSError(
                        f"cannot download {file.url} in {ATTEMPTS} attempts: {problem}"
                    ) from error
                logger.warning("downloading %s again: %s", file.url, problem)
            time.sleep(pause)
            pause *= 2

    def _make_room(self, size: int) -> None:
        """Remove the files that were opened least recently until a new one fits."""
        self.folder.mkdir(parents=True, exist_ok=True)
        found = []
        for path in self.folder.glob("*.tar"):
            with contextlib.suppress(FileNotFoundError):  # removed by another process
                found.append((path.stat(), path))
        total = sum(status.st_size for status, _ in found)
        for status, path in sorted(found, key=lambda item: item[0].st_mtime):
            if total + size <= self.max_bytes:
                return
            path.unlink(missing_ok=True)
            total -= status.st_size

    @contextlib.contextmanager
    def _locked(self, path: Path, *, wait: bool) -> Iterator[bool]:
        """Lock a file between processes and threads; yields False if it is locked already."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True


def _copy(file: ShardFile, path: Path) -> None:
    """Download a file and check it.

    Raises:
        OSError: if its size or checksum is wrong.
    """
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    digest = hashlib.sha256()
    try:
        with open_url(file.url) as source, open(partial, "wb") as copy:
            while block := source.read(_READ_BYTES):
                digest.update(block)
                copy.write(block)
            size = copy.tell()
        if size != file.size:
            raise OSError(f"it has {size} bytes instead of {file.size}")
        if digest.hexdigest() != file.sha256:
            raise OSError(f"its SHA-256 is {digest.hexdigest()} instead of {file.sha256}")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
