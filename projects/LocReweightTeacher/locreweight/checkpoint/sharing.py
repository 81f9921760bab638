"""Texts without what they say of the machine that they were written on."""

from __future__ import annotations

import ast
import os
import shlex
from typing import Any

from detectron2.config import CfgNode

# Addresses that mean the same everywhere. Others may name a company's server, or a password.
_PUBLIC = ("detectron2://", "catalog://", "locreweight://")


def shareable(value: Any) -> Any:
    """A value of a config in which paths that lead out of the working folder are their last part.

    So are addresses of servers. Texts are taken apart at their colons, as names of data sets are;
    lists and the like are gone through; everything else stays.
    """
    if isinstance(value, str):
        if value.startswith(_PUBLIC):
            return value
        if "://" in value:
            return value.partition("?")[0].rpartition("/")[2]
        return ":".join(_last_part(part) for part in value.split(":"))
    if isinstance(value, list | tuple):
        return type(value)(shareable(part) for part in value)
    if isinstance(value, dict):
        return {key: shareable(part) for key, part in value.items()}
    return value


def shareable_config(cfg: CfgNode, name: str) -> CfgNode:
    """A config to hand on.

    Args:
        cfg: of a training.
        name: of the model that came of it.
    """
    shared = CfgNode(shareable(cfg))
    shared.OUTPUT_DIR = f"output/{name.rpartition('/')[2]}"
    if not shared.MODEL.WEIGHTS.startswith(_PUBLIC):
        shared.MODEL.WEIGHTS = ""  # the file is not handed on
    shared.MODEL.TRUST_WEIGHTS = False
    return shared


def shareable_command(command: str) -> str:
    """A command line, each of whose arguments is shareable."""
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


def _last_part(path: str) -> str:
    if path.startswith(("/", "~")) or ".." in path.split("/"):
        return os.path.basename(os.path.normpath(path))
    return path
