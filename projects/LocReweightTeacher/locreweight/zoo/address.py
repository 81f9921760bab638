"""``locreweight://<name>``: the weights of a model in the zoo, ``locreweight://<name>.yaml``: its
config. Importing this module makes both known to Detectron2's ``PathManager``.

The zoo is where the environment variable ``LOCREWEIGHT_ZOO`` says: a folder, or any address that
Detectron2's ``PathManager`` reads. What comes from another machine is kept in iopath's cache
(``FVCORE_CACHE``); every file is checked against the index before it is used.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
import tempfile
from pathlib import Path
from typing import IO, Any

from detectron2.utils.file_io import PathHandler, PathManager
from iopath.common.file_io import get_cache_dir

from ..errors import UsageError
from .entry import CONFIG, INDEX, ZooEntry, check_name, parse_index, sha256_of

logger = logging.getLogger(__name__)

PREFIX = "locreweight://"
VARIABLE = "LOCREWEIGHT_ZOO"


class ZooPathHandler(PathHandler):
    """Makes addresses of the zoo local files."""

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        name = path.removeprefix(PREFIX)
        entry = find_entry(name)
        return fetch(entry, CONFIG if name.endswith(".yaml") else entry.weights)

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO:
        if "w" in mode or "a" in mode or "+" in mode:
            raise UsageError(f"{path} cannot be written to; tools/publish.py adds to a zoo")
        return open(self._get_local_path(path), mode, buffering)


def zoo_root() -> str:
    """Address of the zoo, without a slash at the end.

    Raises:
        UsageError: if none is named.
    """
    root = os.environ.get(VARIABLE, "").rstrip("/")
    if not root:
        raise UsageError(
            f"the environment variable {VARIABLE} is not set: name the folder or the address of a "
            f"model zoo, as in {VARIABLE}=https://example.org/zoo"
        )
    return root if "://" in root else os.path.expanduser(root)


def read_index() -> dict[str, ZooEntry]:
    """The models of the zoo by name.

    An index changes, so a cached copy is used only while the zoo cannot be reached.

    Raises:
        UsageError: if there is no zoo at the address, or its index is damaged.
    """
    root = zoo_root()
    source = f"{root}/{INDEX}"
    if not _is_remote(root):
        try:
            return parse_index(Path(source.removeprefix("file://")).read_text(), source)
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"there is no model zoo at {VARIABLE}={root}: {error}") from error
    copy = Path(_cache_of(root)) / INDEX
    try:
        with tempfile.TemporaryDirectory() as folder:
            content = Path(PathManager.get_local_path(source, force=True, cache_dir=folder))
            text = content.read_text(encoding="utf-8")
    except Exception as error:  # whatever the network and the handler of the address raise
        if not copy.is_file():
            raise UsageError(f"there is no model zoo at {VARIABLE}={root}: {error}") from error
        logger.warning("%s cannot be reached (%s): its last known index is used", root, error)
        return parse_index(copy.read_text(encoding="utf-8"), str(copy))
    entries = parse_index(text, source)
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text(text, encoding="utf-8")
    return entries


def find_entry(name: str) -> ZooEntry:
    """What the zoo says of a model.

    Raises:
        UsageError: if it has no model of this name.
    """
    plain = check_name(name)
    entries = read_index()
    if plain not in entries:
        close = difflib.get_close_matches(plain, entries, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else f"it has: {', '.join(entries)}"
        raise UsageError(f"the model zoo {zoo_root()} has no model {plain!r}; {hint}")
    return entries[plain]


def address_of(entry: ZooEntry, file: str) -> str:
    """Where a file of a model lies in the zoo."""
    return f"{zoo_root()}/{entry.name}/{file}"


def fetch(entry: ZooEntry, file: str) -> str:
    """A file of a model on this machine, with the content that the index says it has.

    A cached copy with another content is removed and fetched again, once.

    Returns:
        its path.

    Raises:
        UsageError: if it cannot be had, or is not what the index says.
    """
    source, expected = address_of(entry, file), entry.sha256[file]
    remote = _is_remote(source)
    path = _local_path(source)
    if remote and sha256_of(path) != expected:
        logger.warning("the cached copy %s is damaged or of before: fetched again", path)
        os.unlink(path)
        path = _local_path(source)
    found = sha256_of(path)
    if found != expected:
        if remote:
            os.unlink(path)
        raise UsageError(
            f"{source} is damaged or not the file that was published: its SHA-256 begins with "
            f"{found[:8]}, that of the index with {expected[:8]}"
        )
    return path


def _local_path(source: str) -> str:
    try:
        if not _is_remote(source):
            path = source.removeprefix("file://")
        else:
            path = PathManager.get_local_path(source, cache_dir=_cache_of(zoo_root()))
        if not os.path.isfile(path):
            raise FileNotFoundError("it does not exist")
    except Exception as error:  # whatever the network and the handler of the address raise
        raise UsageError(f"{source} cannot be fetched: {error}") from error
    return path


def _is_remote(address: str) -> bool:
    return "://" in address and not address.startswith("file://")


def _cache_of(root: str) -> str:
    """A folder for each zoo: the cache goes by paths alone, whatever the host."""
    digest = hashlib.sha256(root.encode()).hexdigest()[:8]
    return os.path.join(get_cache_dir(), f"locreweight_zoo_{digest}")


PathManager.register_handler(ZooPathHandler(), allow_override=True)
