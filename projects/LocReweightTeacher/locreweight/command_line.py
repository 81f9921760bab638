"""Argument parser with ``KEY VALUE`` pairs of the config, and arguments that tools share."""

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


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of tools that load one checkpoint."""
    parser.add_argument("--weights", required=True, help="a checkpoint or an OUTPUT_DIR")
    parser.add_argument(
        "--config-file", default="", help="for checkpoints that do not contain their config"
    )
    parser.add_argument(
        "--device", default="", help="cuda or cpu. Default: a GPU if there is one, else the CPU"
    )
    parser.add_argument(
        "--batch", type=int, default=0, help="images per batch. Default: 8 on a GPU, 1 on the CPU"
    )
