"""Record how a run was started: command, commit, versions and machine."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
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
        command: shell command, to be run in the root of the repository.
        commit: commit of the repository, with "+changes" if tracked files were changed or Python
            files were added; empty outside of git.
        started: local time, ISO 8601.
        processes: number of processes that train together.
        versions: package -> version.
        machine: "system", "CPU", "cores" and "GPUs".
    """

    command: str
    commit: str
    started: str
    processes: int
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, str] = field(default_factory=dict)

    @property
    def processors(self) -> str:
        """Short description of CPU and GPUs."""
        gpus = self.machine.get("GPUs", _NO_GPU)
        cpu = f"{self.machine.get('cores', '?')} x {self.machine.get('CPU', 'unknown')}"
        return cpu if gpus == _NO_GPU else f"{cpu}, {gpus}"


def write_run_record(output: Path, arguments: list[str], processes: int) -> None:
    """Append this start to ``OUTPUT_DIR/run.json``. A resumed run has several starts.

    Args:
        output: ``OUTPUT_DIR``.
        arguments: command line, starting with the script.
        processes: number of processes that train together.
    """
    script = os.path.relpath(arguments[0])
    record = RunRecord(
        command=shlex.join(["python", script, *arguments[1:]]),
        commit=_commit(),
        started=time.strftime("%Y-%m-%dT%H:%M:%S"),
        processes=processes,
        versions=software_versions(),
        machine=_machine(),
    )
    starts = [*read_run_records(output), record]
    text = json.dumps([asdict(start) for start in starts], indent=2) + "\n"
    atomic_write_bytes(output / RUN_FILE, text.encode())


def read_run_records(output: Path) -> list[RunRecord]:
    """Return all starts of a run, oldest first; none if the file is missing."""
    file = output / RUN_FILE
    if not file.is_file():
        return []
    return [RunRecord(**start) for start in json.loads(file.read_text())]


def software_versions() -> dict[str, str]:
    """Package -> version, for those on which results depend."""
    versions = {
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": version("timm"),
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
        # Among new files only code matters, such as a new method. The config is saved with the run.
        new = git("ls-files", "--others", "--exclude-standard", ":/*.py")
        return commit + ("+changes" if changed or new else "")
    except (OSError, subprocess.CalledProcessError):  # no git, or an installed copy
        return ""
