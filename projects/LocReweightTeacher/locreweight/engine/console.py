"""What a training prints on the console; ``log.txt`` in the output folder has everything.

The console shows messages of :data:`CONSOLE`, warnings and errors. With ``--verbose`` it shows the
whole log. Only the main process prints.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import detectron2
import fvcore
import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.logger import setup_logger
from tqdm import tqdm

from ..run_files import CONFIG_FILE

logger = logging.getLogger(__name__)
_prints = logging.getLogger("locreweight.printed")

# Messages for the user. They are shown on the console and written to the log.
CONSOLE = logging.getLogger("locreweight.console")

LOGGED = ("detectron2", "fvcore", "locreweight", "py.warnings")
LOG_FILE = "log.txt"
_FRAMEWORKS = tuple(
    str(Path(package.__path__[0])) for package in (torch, torchvision, detectron2, fvcore)
)


def setup_logging(output_dir: str, *, verbose: bool = False) -> None:
    """Log to ``output_dir/log.txt`` (further processes: ``log.txt.rank<n>``) and to the console.

    Args:
        output_dir: ``OUTPUT_DIR``; created if missing.
        verbose: print the whole log.

    Raises:
        OSError: if the log cannot be written.
    """
    logging.captureWarnings(True)
    console = _console_handler(verbose)
    for name in LOGGED:
        setup_logger(output_dir, comm.get_rank(), name=name, configure_stdout=False)
        named = logging.getLogger(name)
        named.handlers = [h for h in named.handlers if not isinstance(h, ConsoleHandler)]
        if comm.is_main_process():
            named.addHandler(console)
    # PyTorch prints warnings about itself, such as that there is no CUDA runtime. Errors stay.
    to_file = [h for h in logging.getLogger("locreweight").handlers if h is not console]
    torch_logger = logging.getLogger("torch")
    for handler in torch_logger.handlers:
        if handler not in to_file:
            handler.setLevel(logging.DEBUG if verbose else logging.ERROR)
    torch_logger.handlers = list(dict.fromkeys([*torch_logger.handlers, *to_file]))


def log_setup(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Log environment, arguments and config, and write ``config.yaml``.

    Raises:
        OSError: if the file cannot be written.
    """
    logger.info("process %d of %d", comm.get_rank() + 1, comm.get_world_size())
    logger.info("environment:\n%s", describe_environment())
    logger.info("arguments: %s", args)
    logger.info("config:\n%s", cfg.dump())
    if comm.is_main_process():
        Path(cfg.OUTPUT_DIR, CONFIG_FILE).write_text(cfg.dump())


def describe_environment() -> str:
    """Return Detectron2's summary, without the shell's error if there is no C++ compiler."""
    if shutil.which(os.environ.get("CXX", "c++")):
        return collect_env_info()
    # The shell would print that the compiler is missing.
    with mock.patch.dict(os.environ, CXX="false"):
        return collect_env_info()


class ConsoleHandler(logging.StreamHandler):
    """Prints log records, above the progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=self.stream)
        except OSError:
            self.handleError(record)


def _console_handler(verbose: bool) -> ConsoleHandler:
    # The stream of now: prints_to_log() replaces sys.stdout for some time.
    handler = ConsoleHandler(sys.stdout)
    if verbose:
        format_ = "[%(asctime)s] %(name)s %(levelname)s: %(message)s"
        handler.setFormatter(logging.Formatter(format_, "%m/%d %H:%M:%S"))
    else:
        handler.setFormatter(_ShortFormatter())
        handler.addFilter(is_for_console)
    return handler


class _ShortFormatter(logging.Formatter):
    """The message only, and the level of warnings and errors."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage().rstrip()
        if record.levelno < logging.WARNING:
            return text
        return f"{record.levelname.lower()}: {text}"


def is_for_console(record: logging.LogRecord) -> bool:
    """Whether a record is shown without ``--verbose``."""
    if record.name == "py.warnings":  # "<file>:<line>: <category>: <message>"
        return not record.getMessage().startswith(_FRAMEWORKS)
    # Detectron2 logs an exception that it raises again: it is printed when the process ends.
    if record.name == "detectron2.engine.train_loop":
        return False
    return record.levelno >= logging.WARNING or record.name == CONSOLE.name


@contextlib.contextmanager
def prints_to_log() -> Iterator[None]:
    """Write what the code inside prints, such as the tables of pycocotools, to the log."""
    with contextlib.redirect_stdout(_LogWriter()):
        yield


class _LogWriter(io.TextIOBase):
    def __init__(self) -> None:
        self._incomplete = ""

    def write(self, text: str) -> int:
        *lines, self._incomplete = (self._incomplete + text).split("\n")
        for line in lines:
            if line.strip():
                _prints.info("%s", line)
        return len(text)
