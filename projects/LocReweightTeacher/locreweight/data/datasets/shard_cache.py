"""Local copies of remote shards: downloads, checksums, retries and a bounded size."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar
from urllib.parse import urlsplit

from ...errors import UsageError
from ...file_io import atomic_write

logger = logging.getLogger(__name__)

DEFAULT_CACHE_DIR = "~/.cache/locreweight/shards"
ATTEMPTS = 5
FIRST_PAUSE = 0.5  # seconds before the second attempt; doubles with each
_READ_BYTES = 1 << 20
_SHARD_PATTERN = "[0-9a-f]" * 64 + ".tar"

T = TypeVar("T")


@dataclass(frozen=True)
class ShardFile:
    """A file of an index: its URL or path, size in bytes, and SHA-256.

    Raises:
        ValueError: if the SHA-256 of a remote file is not one; the cache uses it as a file name.
    """

    url: str
    size: int
    sha256: str

    def __post_init__(self) -> None:
        if not is_local(self.url) and not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise ValueError(f"the SHA-256 of {self.url} is {self.sha256!r}")


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


def with_retries(download: Callable[[], T], url: str) -> T:
    """Download, again after a pause if it fails, and return the result.

    A file that does not exist, or that may not be read, is not tried again.

    Raises:
        OSError: names the URL.
    """
    pause = FIRST_PAUSE
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return download()
        except UsageError:
            raise
        except Exception as error:  # each kind of storage has its own exceptions
            problem = f"{type(error).__name__}: {error}"
            if attempt == ATTEMPTS or isinstance(error, FileNotFoundError | PermissionError):
                raise OSError(
                    f"cannot download {url}, attempt {attempt} of {ATTEMPTS}: {problem}"
                ) from error
            logger.warning("downloading %s again: %s", url, problem)
        time.sleep(pause)
        pause *= 2
    raise AssertionError("the last attempt returns or raises")


class ShardCache:
    """Files of remote URLs in a local folder, which processes may share.

    A file is complete once it has its name. A lock per file lets only one process download it. The
    shards that were opened least recently are removed when the folder exceeds its size. A removed
    file stays readable where it is open. Other files in the folder are left alone.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """
        Args:
            folder: created when the first file is downloaded.
            max_bytes: size of all files; at least one is kept.
        """
        self.folder = folder
        self.max_bytes = max_bytes

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
                    if os.fstat(opened.fileno()).st_size == file.size:
                        os.utime(opened.fileno())
                        return opened
                    opened.close()
                self._download(file, path)

    def local_path(self, file: ShardFile) -> Path:
        """Path of a file that stays in the folder, after downloading it if necessary."""
        with self.open(file):
            return Path(file.url) if is_local(file.url) else self._path(file)

    def prefetch(self, files: Sequence[ShardFile]) -> None:
        """Download files in a background thread."""
        missing = [f for f in files if not is_local(f.url) and not self._path(f).exists()]
        if missing:
            threading.Thread(target=self._download_all, args=(missing,), daemon=True).start()

    def _path(self, file: ShardFile) -> Path:
        # A signed URL has a query.
        return self.folder / (file.sha256 + Path(urlsplit(file.url).path).suffix)

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
        def attempt() -> None:
            self._make_room(file.size)
            atomic_write(path, partial(_copy, file))

        with_retries(attempt, file.url)

    def _make_room(self, size: int) -> None:
        """Remove the files that were opened least recently until a new one fits."""
        self.folder.mkdir(parents=True, exist_ok=True)
        found = []
        for path in self.folder.glob(_SHARD_PATTERN):
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
            try:
                yield True
            finally:
                # Closing it is not enough: a process forked meanwhile has it open, too.
                fcntl.flock(lock, fcntl.LOCK_UN)


def _copy(file: ShardFile, output: BinaryIO) -> None:
    """Download a file and check it.

    Raises:
        OSError: if its size or checksum is wrong.
    """
    digest = hashlib.sha256()
    with open_url(file.url) as source:
        while block := source.read(_READ_BYTES):
            digest.update(block)
            output.write(block)
    size = output.tell()
    if size != file.size:
        raise OSError(f"it has {size} bytes instead of {file.size}")
    if digest.hexdigest() != file.sha256:
        raise OSError(f"its SHA-256 is {digest.hexdigest()} instead of {file.sha256}")
