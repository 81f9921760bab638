"""Removal of private paths and addresses from configs and commands before publishing."""

from __future__ import annotations

import ast
import os
import re
import shlex
from pathlib import PurePosixPath
from typing import Any

from detectron2.config import CfgNode

from .timm_weights import HUB

# Addresses that are the same for everyone. Others may contain server names or passwords.
_PUBLIC = ("detectron2://", "catalog://", "locreweight://")
# Colon before an address or an absolute path, as in shards:s3://... and coco:/a.json:/images.
_COLON = re.compile(r":(?=[A-Za-z][\w+.-]*://|~?/(?!/))")


def shareable(value: Any) -> Any:
    """Reduce paths outside of the working folder, and addresses of servers, to their last part.

    Strings are split at colons, as in names of data sets. Lists, tuples and dictionaries are
    processed recursively; other values are returned unchanged.
    """
    if isinstance(value, str):
        if value.startswith(_PUBLIC):
            return value
        if "://" in value:
            parts = _COLON.split(value.partition("?")[0])
            return ":".join(_address_name(x) if "://" in x else shareable(x) for x in parts)
        return ":".join(_last_part(part) for part in value.split(":"))
    if isinstance(value, list | tuple):
        return type(value)(shareable(part) for part in value)
    if isinstance(value, dict):
        return {key: shareable(part) for key, part in value.items()}
    return value


def shareable_config(cfg: CfgNode, name: str) -> CfgNode:
    """Config for publishing.

    Args:
        cfg: config of the training run.
        name: name of the published model.
    """
    shared = CfgNode(shareable(cfg))
    shared.OUTPUT_DIR = f"output/{name.rpartition('/')[2]}"
    if not shared.MODEL.WEIGHTS.startswith(_PUBLIC):
        shared.MODEL.WEIGHTS = ""  # the file is not published
    if shared.MODEL.TIMM.PRETRAINED != HUB:
        shared.MODEL.TIMM.PRETRAINED = ""
    shared.MODEL.TRUST_WEIGHTS = False
    shared.DATASETS.SHARDS.CACHE_DIR = ""  # of this machine
    return shared


def shareable_command(command: str) -> str:
    """Command line with private paths removed from all arguments."""
    return shlex.join(_shareable_argument(argument) for argument in shlex.split(command))


def _shareable_argument(argument: str) -> str:
    option, equals, value = argument.partition("=")
    if option.startswith("-") and equals:
        return f"{option}={_shareable_argument(value)}"
    try:
        literal = ast.literal_eval(argument)
    except (SyntaxError, ValueError):
        literal = argument
    shared = shareable(literal)
    return argument if shared == literal else str(shared)


def _address_name(address: str) -> str:
    """Last part of the path of an address; empty without a path."""
    _, _, path = address.rpartition("://")[2].partition("/")
    return PurePosixPath(path).name


def _last_part(path: str) -> str:
    if path.startswith(("/", "~")) or ".." in path.split("/"):
        return os.path.basename(os.path.normpath(path))
    return path
