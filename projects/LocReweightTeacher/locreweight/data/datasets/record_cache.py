"""Cache of parsed annotation files, so that the next start of a run does not parse them again."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import logging
import os
import pickle
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from detectron2.structures import BoxMode

from ...file_io import atomic_write_bytes

logger = logging.getLogger(__name__)

# Smaller files are parsed in less than a second.
MIN_CACHED_BYTES = 16 << 20
_DIGEST_BYTES = hashlib.sha256().digest_size


class RecordCache:
    """Files in a folder, one for each content that was parsed.

    A file is named after the SHA-256 of the content and the version of the parser. It starts with
    the SHA-256 of the rest, which is a pickle without classes other than ``BoxMode``, so that a
    damaged or foreign file cannot run code. Files that cannot be read are written again.
    """

    def __init__(self, folder: Path | None) -> None:
        """
        Args:
            folder: created if its parent exists. None, or a missing parent: nothing is cached.
        """
        self._folder = folder

    def get(self, content: bytes, version: str, parse: Callable[[bytes], Any]) -> Any:
        """Return ``parse(content)``, from the cache if it is there.

        Args:
            content: the content of the annotation file.
            version: changes whenever ``parse`` returns something else for the same content.
            parse: returns dicts, lists, tuples, texts, numbers and ``BoxMode``. Its exceptions are
                not cached.
        """
        if not (self._folder and self._folder.parent.is_dir()) or len(content) < MIN_CACHED_BYTES:
            return parse(content)
        file = self._folder / f"{version}-{hashlib.sha256(content).hexdigest()}.pkl"
        with contextlib.suppress(FileNotFoundError):
            try:
                parsed = _decode(file.read_bytes())
                logger.info("read the annotations from the cache %s", file)
                return parsed
            except (OSError, ValueError) as error:
                if isinstance(error, FileNotFoundError):
                    raise
                logger.warning("the cache %s is not used: %s. It is written again", file, error)
        parsed = parse(content)
        try:
            self._folder.mkdir(exist_ok=True)
            # Processes of several machines may write at the same time.
            own = file.with_name(f"{file.stem}-{socket.gethostname()}-{os.getpid()}")
            atomic_write_bytes(own, _encode(parsed))
            os.replace(own, file)
        except OSError as error:  # a full disk or a folder of someone else
            logger.warning(
                "cannot write the cache %s: %s. Training continues without it", file, error
            )
        return parsed


NO_CACHE = RecordCache(None)


@contextlib.contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """Do not search for reference cycles, which takes most of the time while records are made."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if (module, name) == (BoxMode.__module__, BoxMode.__qualname__):
            return BoxMode
        raise pickle.UnpicklingError(f"it contains {module}.{name}")


def _encode(parsed: Any) -> bytes:
    content = pickle.dumps(parsed, protocol=5)
    return hashlib.sha256(content).digest() + content


def _decode(stored: bytes) -> Any:
    digest, content = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        raise ValueError("it is damaged")
    try:
        with garbage_collection_paused():
            return _Unpickler(io.BytesIO(content)).load()
    except Exception as error:  # pickle raises all kinds of exceptions
        raise ValueError(str(error)) from error
