"""``locreweight://<name>``: the weights of a model in the zoo, ``locreweight://<name>.yaml``: its
config. Importing this module makes both known to Detectron2's ``PathManager``.

The zoo is where the environment variable ``LOCREWEIGHT_ZOO`` says: a folder, or any address that
Detectron2's ``PathManager`` reads. What comes from another machine is kept in iopath's cache
(``FVCORE_CACHE``); every file is checked against the index before it is used.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, Any

from detectron2.utils.file_io import PathHandler, PathManager
from iopath.common.file_io import get_cache_dir

from ..errors import UsageError
from .safe_loading import SUFFIX

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


# --------------------------------------------------------------------------------------------------
# What a zoo says of its models, as json.


INDEX = "index.json"
ENTRY = "model.json"
CONFIG = "config.yaml"
PAGE = "README.md"  # of the zoo, and of each model
FORMAT = 1  # of index.json

# No part begins with a dot: a name stays inside of the zoo.
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)*", re.ASCII)
_FILE = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ZooEntry:
    """One model.

    Attributes:
        name: under which it is asked for; may have slashes, as Detectron2's names do.
        weights: the file of its weights, in its folder.
        sha256: digest of each of its files, by name.
        class_names: in the order of the model's classes.
        metrics: of these weights on the test set of their training, in percent.
        iterations: of training that the weights have seen.
        license: of the weights; empty if none was stated.
        training_command: for a shell in this repository's root.
        versions: of what it was trained with, by name.
    """

    name: str
    weights: str
    sha256: dict[str, str]
    class_names: list[str]
    metrics: dict[str, float] = field(default_factory=dict)
    iterations: int = 0
    license: str = ""
    training_command: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_dict(cls, content: Any, source: str) -> ZooEntry:
        """An entry that somebody else wrote.

        Args:
            content: of the json.
            source: the file, for errors.

        Raises:
            UsageError: if anything is missing or of another type, or a file is not in the folder.
        """
        try:
            known = {f.name for f in fields(cls)}
            entry = cls(**{key: value for key, value in content.items() if key in known})
            check_name(entry.name)
            for file, digest in entry.sha256.items():
                if not (_FILE.fullmatch(file) and _SHA256.fullmatch(digest)):
                    raise ValueError(f"{file!r}: {digest!r} is no file with its SHA-256")
            if not entry.weights.endswith(SUFFIX):
                raise ValueError(f"the weights {entry.weights!r} are no safetensors")
            if missing := {entry.weights, CONFIG} - entry.sha256.keys():
                raise ValueError(f"no SHA-256 of {missing}")
            names = entry.class_names
            if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
                raise ValueError("class names are not text")
        except (AttributeError, TypeError, ValueError) as error:
            raise UsageError(f"{source} is damaged or of no model zoo: {error}") from error
        return entry


def check_name(name: str) -> str:
    """The name of a model without Detectron2's ``.yaml``.

    Raises:
        UsageError: if it could not be the name of one, such as ``../other``.
    """
    plain = name.removesuffix(".yaml")
    if not _NAME.fullmatch(plain) or {INDEX, PAGE} & set(plain.split("/")):
        raise UsageError(
            f"{name!r} cannot be the name of a model: use letters, digits, '_', '-' and '.', with "
            "'/' between parts"
        )
    return plain


def sha256_of(file: str | Path) -> str:
    """Hexadecimal digest of a file's content."""
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_index(zoo: Path) -> list[ZooEntry]:
    """Write ``index.json`` anew from the entries that lie in a zoo's folder; returns them."""
    entries = []
    for file in sorted(zoo.rglob(ENTRY)):
        if not any(part.startswith(".") for part in file.relative_to(zoo).parts):
            entries.append(ZooEntry.from_dict(_json_of(file.read_text(), str(file)), str(file)))
    content = {"format": FORMAT, "models": [asdict(entry) for entry in entries]}
    unfinished = zoo / f".{INDEX}"
    unfinished.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    unfinished.replace(zoo / INDEX)
    return entries


def parse_index(text: str, source: str) -> dict[str, ZooEntry]:
    """The models of an ``index.json``, by name.

    Raises:
        UsageError: if it is none, or of a later version of this project.
    """
    content = _json_of(text, source)
    if not isinstance(content, dict) or not isinstance(content.get("models"), list):
        raise UsageError(f"{source} is damaged or of no model zoo: it has no list of models")
    if content.get("format") != FORMAT:
        raise UsageError(
            f"{source} is of the format {content.get('format')}, and this version of locreweight "
            f"reads {FORMAT}: update it"
        )
    entries: Iterable[ZooEntry] = (ZooEntry.from_dict(c, source) for c in content["models"])
    return {entry.name: entry for entry in entries}


def _json_of(text: str, source: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UsageError(f"{source} is damaged or of no model zoo: {error}") from error
