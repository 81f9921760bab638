"""What a zoo says of its models, as json."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .weights import SUFFIX

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
