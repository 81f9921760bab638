"""Checks at startup that all processes, on all hosts, run the same training.

The processes exchange versions, config and checksums. If something differs, all of them raise the
same error, which names the host and what differs. With one process there is nothing to compare.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import socket
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.utils import comm

from ..data.training_sets import TrainingSets
from ..errors import UsageError
from ..file_io import sha256_of
from ..run_files import TOKEN_PREFIX
from .run_folder import flatten_config
from .run_record import software_versions

_PACKAGE = Path(__file__).parents[1]
_FLAGS = ("resume", "overwrite", "eval_only")  # config keys show the effect of the others
_MAX_NAMED = 5  # differences in a message
# Network file systems show a new file to other hosts only after some time: by default, NFS caches
# folders for up to 60 seconds.
_VISIBLE_AFTER_SECONDS = 60.0


def describe_process() -> str:
    """Name of this process, for messages."""
    return f"process {comm.get_rank()} on {socket.gethostname()}"


@contextlib.contextmanager
def raised_everywhere() -> Iterator[None]:
    """Raise a UsageError of one process in all processes.

    The code inside must not communicate. A process whose own code fails raises its own error.
    """
    error = None
    try:
        yield
    except UsageError as own:
        error = own
    errors = comm.all_gather(f"{describe_process()}: {error}" if error else "")
    if error:
        raise error
    if first := next(filter(None, errors), ""):
        raise UsageError(first)


def check_same_setup(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Check that all processes have the same code, versions, config and flags.

    Args:
        cfg: the effective config.
        args: the command line.

    Raises:
        UsageError: on all processes, if something differs.
    """
    if comm.get_world_size() == 1:
        return
    flags = {f"--{name.replace('_', '-')}": getattr(args, name, None) for name in _FLAGS}
    versions = software_versions()
    versions.pop("Python")  # another patch version does no harm
    _check_same(
        {**versions, **flags, **flatten_config(cfg), **_code()},
        "start the same command, in the same version of the project, on all hosts",
    )


def check_same_data(cfg: CfgNode, sets: TrainingSets) -> None:
    """Check that all processes have read the same training and test images and annotations.

    The contents of the images are not compared.

    Raises:
        UsageError: on all processes, if something differs.
    """
    if comm.get_world_size() == 1:
        return
    tests = {f"the test set {name}": DatasetCatalog.get(name) for name in cfg.DATASETS.TEST}
    _check_same(
        {
            **{f"the list of {stream} images": text for stream, text in sets.fingerprint.items()},
            "the list of labeled boxes": _digest_records(sets.labeled),
            **{name: _digest_records(records) for name, records in tests.items()},
        },
        "give all hosts the same data sets",
    )


def check_shared_folder(folder: Path) -> None:
    """Check that all processes see the files that the main process writes.

    Args:
        folder: ``OUTPUT_DIR``, which the main process has created.

    Raises:
        UsageError: on all processes, if one does not see them.
    """
    token = folder / comm.all_gather(TOKEN_PREFIX + uuid.uuid4().hex)[0]
    if comm.is_main_process():
        token.touch()
    comm.synchronize()
    try:
        without_file = [name for name in comm.all_gather(_name_if_missing(token)) if name]
    finally:
        if comm.is_main_process():
            token.unlink(missing_ok=True)
    if without_file:
        processes = _and_others(without_file)
        raise UsageError(
            f"OUTPUT_DIR {str(folder)!r} is another folder for {processes} than for the main "
            "process: it must be on a disk that all hosts share, under the same path"
        )


def _name_if_missing(token: Path) -> str:
    end = time.monotonic() + _VISIBLE_AFTER_SECONDS
    while not token.exists():
        if time.monotonic() > end:
            return describe_process()
        time.sleep(0.2)
    return ""


def _check_same(own: Mapping[str, object], remedy: str) -> None:
    """Check that something is the same in all processes; ``own`` maps its names to values."""
    texts = {name: str(value) for name, value in own.items()}
    first, *others = comm.all_gather((describe_process(), texts))
    for process, values in others:
        names = list(dict.fromkeys([*first[1], *values]))
        differences = [
            f"{name} is {values.get(name, 'missing')} instead of {first[1].get(name, 'missing')}"
            for name in names
            if values.get(name) != first[1].get(name)
        ]
        if differences:
            raise UsageError(
                f"{process} differs from {first[0]}: {_and_others(differences, '; ')}. To train "
                f"together, {remedy}"
            )


def _and_others(items: Sequence[str], separator: str = ", ") -> str:
    named = separator.join(items[:_MAX_NAMED])
    more = len(items) - _MAX_NAMED
    return f"{named} and {more} more" if more > 0 else named


def _code() -> dict[str, str]:
    """Digests of the modules of the package and of the program."""
    files = {str(file.relative_to(_PACKAGE.parent)): file for file in _PACKAGE.rglob("*.py")}
    program = Path(sys.argv[0])
    if program.is_file():
        files[program.name] = program
    return {f"the file {name}": sha256_of(files[name])[:12] for name in sorted(files)}


def _digest_records(records: Sequence[dict]) -> str:
    """Number of images, and digest of their names, sizes and annotations in order."""
    digest = hashlib.sha256()
    for record in records:
        boxes = [
            (a["bbox"], a["category_id"], a.get("iscrowd", 0))
            for a in record.get("annotations", ())
        ]
        image = (Path(record["file_name"]).name, record.get("height"), record.get("width"))
        digest.update(repr((image, boxes)).encode())
    return f"{len(records)} images ({digest.hexdigest()[:12]})"
