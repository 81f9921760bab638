"""Argument parser with ``KEY VALUE`` pairs of the config, and arguments that tools share."""

from __future__ import annotations

import argparse
import errno
import functools
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, ParamSpec, TypeVar

from .errors import UsageError

Parameters = ParamSpec("Parameters")
Number = TypeVar("Number", int, float)
Arguments = TypeVar("Arguments", bound=argparse.Namespace)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keep the line breaks of descriptions, and add its default to the help of each option."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        has_default = bool(default) or (default == 0 and default is not False)
        if action.help is None or not has_default or default == argparse.SUPPRESS:
            return action.help
        if "default" in action.help.lower() or not action.option_strings:
            return action.help
        values = default if isinstance(default, list | tuple) else [default]
        shown = " ".join(map(str, values)).replace("%", "%%")
        return f"{action.help}. Default: {shown}"


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
        defaults: dict[str, Any] = {"allow_abbrev": False, "formatter_class": HelpFormatter}
        super().__init__(**defaults | kwargs)
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


def reports_errors(main: Callable[Parameters, None]) -> Callable[Parameters, None]:
    """Decorate the main function of a tool: errors end it with one line instead of a traceback.

    This holds for mistakes of the user, and for files that cannot be read or written.
    """

    @functools.wraps(main)
    def wrapper(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
        try:
            main(*args, **kwargs)
        except UsageError as error:
            sys.exit(f"error: {error}")
        except OSError as error:
            reason = error.strerror or str(error) or type(error).__name__
            if error.filename is None:
                sys.exit(f"error: {reason}")
            sys.exit(f"error: cannot read or write {error.filename}: {reason}")

    return wrapper


def interrupt_on_signals() -> None:
    """Let signals of a scheduler and of a closed terminal interrupt a tool, as Ctrl-C does.

    A signal that is ignored (SIGHUP after nohup) stays ignored.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)


def count_of(count: int, noun: str) -> str:
    """A number with a noun, such as "1 image" or "2 images"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def check_outputs(*paths: Path | None, are_folders: bool = False) -> None:
    """Check that files or folders can be written, before work that takes long.

    Args:
        paths: they need not exist, nor their folders. None is ignored.
        are_folders: whether the paths are folders.

    Raises:
        OSError: names the file or folder that prevents it.
    """
    for path in filter(None, paths):
        existing = next(place for place in (path, *path.absolute().parents) if place.exists())
        is_folder = existing.is_dir()
        if is_folder and existing == path and not are_folders:
            reason = errno.EISDIR
        elif not is_folder and (existing != path or are_folders):
            reason = errno.ENOTDIR
        elif not os.access(existing, os.W_OK):
            reason = errno.EACCES
        else:
            continue
        raise OSError(reason, os.strerror(reason), str(existing))


THRESHOLD_HELP = (
    "minimum score. Default: the one with the best F1 on the test set of the training; 0.5 if that "
    "is not known"
)


def positive(text: str) -> int:
    """Parse an integer of at least 1, for ``argparse``."""
    return _number_in(int, text, lambda value: value >= 1, "an integer of at least 1")


def non_negative(text: str) -> int:
    """Parse an integer of at least 0, for ``argparse``."""
    return _number_in(int, text, lambda value: value >= 0, "an integer of at least 0")


def score(text: str) -> float:
    """Parse a score in [0, 1], for ``argparse``."""
    return _number_in(float, text, lambda value: 0 <= value <= 1, "a score between 0 and 1")


def _number_in(
    kind: type[Number], text: str, is_valid: Callable[[Number], bool], expected: str
) -> Number:
    try:
        if is_valid(value := kind(text)):
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")


def add_weights_arguments(parser: argparse.ArgumentParser, **kwargs: Any) -> None:
    """Add ``--weights`` and ``--last``.

    Args:
        parser: the parser of a tool.
        kwargs: arguments of ``add_argument`` for ``--weights`` that differ from the usual ones.
    """
    usual: dict[str, Any] = {
        "required": True,
        "help": "a checkpoint, an OUTPUT_DIR, or locreweight://<name>",
    }
    parser.add_argument("--weights", **usual | kwargs)
    parser.add_argument(
        "--last",
        action="store_true",
        help="use the last model of an OUTPUT_DIR. Default: the best one in the evaluations",
    )


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``."""
    parser.add_argument(
        "--device", default="", help="cuda or cpu. Default: a GPU if there is one, else the CPU"
    )


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of tools that run one checkpoint on images."""
    add_weights_arguments(parser)
    parser.add_argument(
        "--config-file", default="", help="for checkpoints that do not contain their config"
    )
    add_device_argument(parser)
    parser.add_argument(
        "--batch", type=positive, help="images per batch. Default: 8 on a GPU, 1 on the CPU"
    )
