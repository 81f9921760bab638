"""What a run was started with, kept beside its results: command, commit, versions, machine."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torchvision

from ..file_io import atomic_write_bytes
from ..installed_detectron2 import describe_detectron2
from ..run_files import RUN_FILE

_NO_GPU = "none"


@dataclass(frozen=True)
class RunRecord:
    """One start of a training. Names of users and hosts are not recorded.

    Attributes:
        command: for a shell in the repository's root.
        commit: of the repository, with "+changes" if files differ from it or Python files came
            to it; empty outside of git.
        started: local time, ISO 8601.
        processes: how many trained together.
        versions: of what it ran on, by name.
        machine: parts by name.
    """

    command: str
    commit: str
    started: str
    processes: int
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, str] = field(default_factory=dict)

    @property
    def processors(self) -> str:
        """CPU and GPUs in a few words."""
        known = self.machine
        gpus = known.get("GPUs", _NO_GPU)
        cpu = f"{known.get('cores', '?')} x {known.get('CPU', 'unknown')}"
        return cpu if gpus == _NO_GPU else f"{cpu}, {gpus}"


def write_run_record(output: Path, arguments: list[str], processes: int) -> None:
    """Add this start to ``OUTPUT_DIR/run.json``; a resumed run has several.

    Args:
        output: ``OUTPUT_DIR``.
        arguments: of the command line, the script first.
        processes: how many train together.
    """
    script = os.path.relpath(arguments[0])
    record = RunRecord(
        command=shlex.join(["python", script, *arguments[1:]]),
        commit=_commit(),
        started=time.strftime("%Y-%m-%dT%H:%M:%S"),
        processes=processes,
        versions=_versions(),
        machine=_machine(),
    )
    starts = [*read_run_records(output), record]
    text = json.dumps([asdict(start) for start in starts], indent=2) + "\n"
    atomic_write_bytes(output / RUN_FILE, text.encode())


def read_run_records(output: Path) -> list[RunRecord]:
    """All starts of a run, the first one first; none if it was not recorded."""
    file = output / RUN_FILE
    if not file.is_file():
        return []
    return [RunRecord(**start) for start in json.loads(file.read_text())]


def _versions() -> dict[str, str]:
    versions = {
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
        "torchvision": torchvision.__version__,
        "Detectron2": describe_detectron2(),
    }
    return versions | ({"CUDA": torch.version.cuda} if torch.version.cuda else {})


def _machine() -> dict[str, str]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    kinds = [f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "CPU": _cpu_name(),
        "cores": str(os.cpu_count()),
        "GPUs": ", ".join(kinds) or _NO_GPU,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def _commit() -> str:
    root = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
        # Of new files only code counts: a strategy of one's own, say. Configs are kept anyway.
        new = git("ls-files", "--others", "--exclude-standard", ":/*.py")
        return commit + ("+changes" if changed or new else "")
    except (OSError, subprocess.CalledProcessError):  # no git, or an installed copy
        return ""
