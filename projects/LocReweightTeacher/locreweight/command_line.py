"""Argument parser for command lines with ``KEY VALUE`` pairs of the config."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, TypeVar

Arguments = TypeVar("Arguments", bound=argparse.Namespace)


class ConfigArgumentParser(argparse.ArgumentParser):
    """Argument parser that takes ``KEY VALUE`` pairs before, between and after the flags.

    The pairs are returned in their order as ``opts``, a flat list. Flags must be spelled out: with
    abbreviations, a later version with another flag could read a command differently. Values of the
    pairs may begin with ``-``, such as ``SEED -1``. Do not add positional arguments.
    """

    def __init__(self, **kwargs: Any) -> None:
        """
        Args:
            kwargs: arguments of ``argparse.ArgumentParser``.
        """
        super().__init__(**{"allow_abbrev": False} | kwargs)
        self.add_argument_group(
            "KEY VALUE ...",
            "config keys and their values, such as SOLVER.MAX_ITER 1000, before or after the flags",
        )

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Arguments | None = None
    ) -> argparse.Namespace | Arguments:
        parsed, pairs = self.parse_known_args(args, namespace)
        unknown = [key for key in pairs[::2] if key.startswith("-")]
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        parsed.opts = pairs
        return parsed
