"""Model zoo: its files, and addresses of its models for Detectron2's ``PathManager``.

``locreweight://<name>`` is the weights of a model, ``locreweight://<name>.yaml`` its config.
Importing this module registers these addresses.

The environment variable ``LOCREWEIGHT_ZOO`` is the location of the zoo: a folder, or an address
that ``PathManager`` can read. Downloads are kept in iopath's cache (``FVCORE_CACHE``), and every
file is verified against the SHA-256 in the index before it is used. A zoo has these files::

    index.json           all models, their files and the SHA-256 of each
    README.md            the same as a table
    <name>/config.yaml   the full config
    <name>/README.md     the model card, and its picture detections.jpg
    <name>/model.json    the model's part of the index
    <name>/<checkpoint>_<first 8 digits of its SHA-256>.safetensors
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
from ..file_io import atomic_write_bytes, sha256_of
from .safe_loading import SAFETENSORS_SUFFIX

logger = logging.getLogger(__name__)

PREFIX = "locreweight://"
VARIABLE = "LOCREWEIGHT_ZOO"
INDEX = "index.json"
ENTRY = "model.json"
CONFIG = "config.yaml"
PAGE = "README.md"  # of the zoo, and of each model
FORMAT = 1  # of index.json

# No part of a name starts with a dot, so that names cannot lead out of the zoo.
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)*", re.ASCII)
_FILE = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ZooEntry:
    """A model of the zoo.

    Attributes:
        name: name of the model; may contain slashes, as in Detectron2.
        weights: name of the weight file in the model's folder.
        sha256: file name -> SHA-256.
        class_names: in the order of the model's classes.
        metrics: results of these weights on the test set of the training, in percent.
        iterations: training iterations.
        license: license of the weights; empty if not stated.
        training_command: shell command, for the root of this repository.
        versions: package -> version that the model was trained with.
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
        """Create an entry from parsed json.

        Args:
            content: the parsed json.
            source: name of the json file, for error messages.

        Raises:
            UsageError: if a field is missing or invalid, or a file is not in the model's folder.
        """
        try:
            known = {f.name for f in fields(cls)}
            entry = cls(**{key: value for key, value in content.items() if key in known})
            check_name(entry.name)
            for file, digest in entry.sha256.items():
                if not (_FILE.fullmatch(file) and _SHA256.fullmatch(digest)):
                    raise ValueError(f"{file!r}: {digest!r} is not a file name and a SHA-256")
            if not entry.weights.endswith(SAFETENSORS_SUFFIX):
                raise ValueError(f"the weights {entry.weights!r} are not a safetensors file")
            if missing := {entry.weights, CONFIG} - entry.sha256.keys():
                raise ValueError(f"no SHA-256 of {missing}")
            names = entry.class_names
            if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
                raise ValueError("class names are not text")
        except (AttributeError, TypeError, ValueError) as error:
            raise UsageError(
                f"{source} is damaged or does not belong to a model zoo: {error}"
            ) from error
        return entry


def check_name(name: str) -> str:
    """Return the name of a model without the suffix ``.yaml``.

    Raises:
        UsageError: if it is not a valid name, such as ``../other``.
    """
    plain = name.removesuffix(".yaml")
    if not _NAME.fullmatch(plain) or {INDEX, PAGE} & set(plain.split("/")):
        raise UsageError(
            f"{name!r} is not a valid model name: use letters, digits, '_', '-' and '.', with '/' "
            "between parts"
        )
    return plain


def write_index(zoo: Path) -> list[ZooEntry]:
    """Write ``index.json`` from the entries in the folder of a zoo, and return the entries."""
    entries = []
    for file in sorted(zoo.rglob(ENTRY)):
        if not any(part.startswith(".") for part in file.relative_to(zoo).parts):
            entries.append(ZooEntry.from_dict(_json_of(file.read_text(), str(file)), str(file)))
    content = {"format": FORMAT, "models": [asdict(entry) for entry in entries]}
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    atomic_write_bytes(zoo / INDEX, text.encode())
    return entries


def parse_index(text: str, source: str) -> dict[str, ZooEntry]:
    """Parse an ``index.json``: model name -> entry.

    Raises:
        UsageError: if it is malformed, or was written by a newer version of this project.
    """
    content = _json_of(text, source)
    if not isinstance(content, dict) or not isinstance(content.get("models"), list):
        raise UsageError(
            f"{source} is damaged or does not belong to a model zoo: no list of models"
        )
    if content.get("format") != FORMAT:
        raise UsageError(
            f"{source} has format {content.get('format')}, but this version of locreweight reads "
            f"format {FORMAT}: update locreweight"
        )
    entries: Iterable[ZooEntry] = (ZooEntry.from_dict(c, source) for c in content["models"])
    return {entry.name: entry for entry in entries}


def _json_of(text: str, source: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UsageError(
            f"{source} is damaged or does not belong to a model zoo: {error}"
        ) from error


# -- access ----------------------------------------------------------------------------------------


class ZooPathHandler(PathHandler):
    """Resolves addresses of the zoo to local files."""

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        name = path.removeprefix(PREFIX)
        entry = find_entry(name)
        return fetch(entry, CONFIG if name.endswith(".yaml") else entry.weights)

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO:
        if "w" in mode or "a" in mode or "+" in mode:
            raise UsageError(f"{path} is read-only; add models with tools/publish.py")
        return open(self._get_local_path(path), mode, buffering)


def zoo_root() -> str:
    """Address of the zoo, without a trailing slash.

    Raises:
        UsageError: if the environment variable is not set.
    """
    root = os.environ.get(VARIABLE, "").rstrip("/")
    if not root:
        raise UsageError(
            f"the environment variable {VARIABLE} is not set: set it to the folder or address of a "
            f"model zoo, such as {VARIABLE}=https://example.org/zoo"
        )
    return root if "://" in root else os.path.expanduser(root)


def read_index() -> dict[str, ZooEntry]:
    """Read the index of the zoo: model name -> entry.

    The index is downloaded each time. A cached copy is used if the zoo cannot be reached.

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
    except Exception as error:  # depends on the network and the handler of the address
        if not copy.is_file():
            raise UsageError(f"there is no model zoo at {VARIABLE}={root}: {error}") from error
        logger.warning("%s cannot be reached (%s): using the cached index", root, error)
        return parse_index(copy.read_text(encoding="utf-8"), str(copy))
    entries = parse_index(text, source)
    copy.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(copy, text.encode())
    return entries


def find_entry(name: str) -> ZooEntry:
    """Find a model in the index.

    Raises:
        UsageError: if the zoo has no model of this name.
    """
    plain = check_name(name)
    entries = read_index()
    if plain not in entries:
        close = difflib.get_close_matches(plain, entries, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else f"it has: {', '.join(entries)}"
        raise UsageError(f"the model zoo {zoo_root()} has no model {plain!r}; {hint}")
    return entries[plain]


def address_of(entry: ZooEntry, file: str) -> str:
    """Address of a file of a model."""
    return f"{zoo_root()}/{entry.name}/{file}"


def fetch(entry: ZooEntry, file: str) -> str:
    """Download a file of a model and verify its checksum.

    A cached copy with a wrong checksum is deleted and downloaded again once.

    Returns:
        local path of the file.

    Raises:
        UsageError: if the file cannot be downloaded, or its checksum is wrong.
    """
    source, expected = address_of(entry, file), entry.sha256[file]
    remote = _is_remote(source)
    path = _local_path(source)
    if remote and sha256_of(path) != expected:
        logger.warning("the cached copy %s is damaged or outdated: downloading it again", path)
        os.unlink(path)
        path = _local_path(source)
    actual = sha256_of(path)
    if actual != expected:
        if remote:
            os.unlink(path)
        raise UsageError(
            f"{source} is damaged or not the file that was published: its SHA-256 begins with "
            f"{actual[:8]}, that of the index with {expected[:8]}"
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
    except Exception as error:  # depends on the network and the handler of the address
        raise UsageError(f"{source} cannot be downloaded: {error}") from error
    return path


def _is_remote(address: str) -> bool:
    return "://" in address and not address.startswith("file://")


def _cache_of(root: str) -> str:
    """Cache folder of a zoo. Each has its own, since iopath's cache ignores host names."""
    digest = hashlib.sha256(root.encode()).hexdigest()[:8]
    return os.path.join(get_cache_dir(), f"locreweight_zoo_{digest}")


PathManager.register_handler(ZooPathHandler(), allow_override=True)
