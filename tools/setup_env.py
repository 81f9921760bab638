#!/usr/bin/env python3
"""Create `.venv` and install what this project needs; quick when nothing has changed.

    python3 tools/setup_env.py [--require-detectron2]

Two environment variables choose other sources. A choice that worked is kept until another is made.

    TORCH        arguments for pip in place of the pinned pair, such as
                 "torch==2.14.1 torchvision==0.29.1 --index-url <of another build>"
    DETECTRON2   a clone's directory, a wheel, or a git URL in place of the pinned commit

Standard library only: this runs before anything is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOG = VENV / "setup.log"
STAMP = VENV / "setup.json"

OLDEST_PYTHON = (3, 10)
# detectron2.model_zoo imports pkg_resources, which setuptools 82 dropped; PyTorch asks for 77.0.3,
# and would bring the newest were it not met.
BUILD_TOOLS = "pip>=22 wheel setuptools>=77.0.3,<81"
TORCH = "torch==2.14.1 torchvision==0.29.1"
DETECTRON2_COMMIT = "02b5c4e295e990042a714712c21dc79b731e8833"
DETECTRON2 = "https://github.com/facebookresearch/detectron2.git"
DETECTRON2_CHECK = "import torch, detectron2._C, detectron2.model_zoo"

# What pip's output says -> what is behind it.
HINTS = (
    (
        r"resolve host|name resolution|unable to access|Failed to connect|timed out|NewConnection",
        "the network: check the connection; behind a proxy, set HTTPS_PROXY",
    ),
    (r"No matching distribution", "the package index has no build for this Python and system"),
    (r"Python\.h", "Python's headers are missing: install python3-dev (python3-devel on Fedora)"),
    (
        r"not our ref|not a tree|did not match any",
        "that repository lacks the commit: name one that it has, as in DETECTRON2=<URL>@<commit>",
    ),
    (
        r"detected CUDA version",
        "nvcc and PyTorch are of different CUDA versions: choose a PyTorch build with TORCH=...,\n"
        "  or set CUDA_VISIBLE_DEVICES= to compile without CUDA kernels (this project uses none)",
    ),
    (r"Killed|out of memory", "too little memory to compile: try again with MAX_JOBS=1"),
    (r"undefined symbol", "it was built against another PyTorch: build it anew, or set TORCH=..."),
    (r"No space left", "the disk is full: PyTorch with CUDA takes some 6 GB"),
)

WITHOUT_DETECTRON2 = """\
NO DETECTRON2: it could not be had from {source}

{error}

To supply it:  make <target> DETECTRON2=<a clone's directory, a wheel or a git URL>
Until then `make quickstart` runs the reference on torchvision, which needs no Detectron2, and
`make test` leaves the tests of Detectron2's binding out. All else is installed; the next call
tries Detectron2 again and nothing else.\
"""
MISSING_DETECTRON2 = 3  # exit status, where it is required and nothing else failed


class SetupError(Exception):
    """What went wrong, and what to do about it."""


class Stamp:
    """The steps that are finished, each with what it was done for.

    A step's entry is removed before the step starts and written after it has ended well: what was
    interrupted is never taken for finished.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.steps: dict[str, list[str]] = {}
        # An unreadable stamp costs a few calls of pip that find everything in place.
        with suppress(FileNotFoundError, ValueError):
            self.steps = json.loads(path.read_text())

    def write(self) -> None:
        # Replaced in one go, so that an interruption leaves the old stamp or the new one.
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.steps, indent=1))
        new.replace(self.path)

    def choice(self, step: str, variable: str) -> str:
        """The source chosen for a step, now or when it was last done; empty for the default."""
        return os.environ.get(variable) or self.steps.get(step, [""])[0]

    @contextmanager
    def step(self, name: str, done_for: list[str], message: str) -> Iterator[None]:
        say(f"{message} ...")
        start = time.monotonic()
        self.steps.pop(name, None)
        self.write()
        yield
        self.steps[name] = done_for
        self.write()
        say(f"    done in {time.monotonic() - start:.0f} s")


def say(message: str) -> None:
    print(f"[setup] {message}", flush=True)


def boxed(text: str) -> str:
    """A text in a frame, which is not overlooked among a log's lines."""
    frame = "#" * 100
    return "\n".join(["", frame, *(f"#  {line}".rstrip() for line in text.splitlines()), frame, ""])


def run(*command: str, environment: dict[str, str] | None = None) -> None:
    """Run a command quietly: all its output goes to the log, the last lines into the error."""
    with LOG.open("a+", errors="replace") as log:
        log.write(f"\n$ {shlex.join(command)}\n")
        log.flush()
        start = log.tell()
        result = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "GIT_TERMINAL_PROMPT": "0", **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        if result.returncode == 0:
            return
        log.seek(start)
        output = log.read()
    lines = [line for line in output.splitlines() if line.strip()][-12:]
    hints = [f"\n  likely: {hint}" for pattern, hint in HINTS if re.search(pattern, output)]
    raise SetupError(
        f"this failed: {shlex.join(command)}\n"
        + "".join(f"  | {line}\n" for line in lines)
        + f"  (all of its output: {LOG})"
        + "".join(hints)
    )


def pip(*arguments: str, environment: dict[str, str] | None = None) -> None:
    options = ("--disable-pip-version-check", "--no-input")
    run(str(PYTHON), "-m", "pip", "install", *options, *arguments, environment=environment)


def make_venv(stamp: Stamp) -> None:
    """Have a working `.venv`; one that this script left half-made is made again."""
    check = f"import pip, sys; sys.exit(sys.version_info < {OLDEST_PYTHON})"
    if PYTHON.exists() and not subprocess.call([PYTHON, "-c", check], stderr=subprocess.DEVNULL):
        return
    if VENV.exists() and not STAMP.exists():
        oldest = ".".join(map(str, OLDEST_PYTHON))
        raise SetupError(
            f"{VENV} was not made by this script, and has no pip or no Python {oldest} or newer.\n"
            "  Remove it and try again."
        )
    if not all(importlib.util.find_spec(module) for module in ("venv", "ensurepip")):
        raise SetupError(
            f"{sys.executable} lacks the venv module.\n"
            "  Install it (apt install python3-venv), or choose another Python: make PYTHON=..."
        )
    say(f"creating .venv with Python {sys.version.split()[0]}")
    shutil.rmtree(VENV, ignore_errors=True)
    VENV.mkdir(exist_ok=True)
    stamp.steps = {}
    stamp.write()
    run(sys.executable, "-m", "venv", str(VENV))


def detectron2_requirement(source: str) -> str:
    """What pip is told to install for a value of DETECTRON2."""
    url = source[4:] if source.startswith("git+") else source
    if "://" in url:
        # An @ in the address names a user, one in the path a commit or branch.
        return f"git+{url}" if "@" in urlsplit(url).path else f"git+{url}@{DETECTRON2_COMMIT}"
    path = Path(source).expanduser().resolve()
    if (path / "setup.py").is_file() or (path.suffix == ".whl" and path.is_file()):
        return str(path)
    raise SetupError(f"{path} is neither a clone of Detectron2 nor a wheel")


def check_build_tools(requirement: str) -> None:
    """Say at once what is missing, rather than minutes later in a compiler's words."""
    if requirement.endswith(".whl"):
        return
    if requirement.startswith("git+") and not shutil.which("git"):
        raise SetupError("git is missing: install it (apt install git)")
    if not os.environ.get("CXX") and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise SetupError("there is no C++ compiler: install one (apt install g++)")


def build_jobs() -> int:
    """Compilers to run at once: one per core, as far as there are 2 GB of memory for each."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(os.cpu_count() or 1, memory // (2 << 30)))


def detectron2_works() -> bool:
    with suppress(SetupError):
        run(str(PYTHON), "-c", DETECTRON2_CHECK)
        return True
    return False


def install_detectron2(requirement: str) -> None:
    pip(
        "--no-build-isolation",  # its build imports the torch that it is compiled against
        "--no-cache-dir",  # pip would hand out a build against an earlier torch
        "--force-reinstall",  # its version number is the same for every commit
        "--no-deps",
        requirement,
        environment={"MAX_JOBS": os.environ.get("MAX_JOBS") or str(build_jobs())},
    )
    # Now that it is there, this adds what it depends on and nothing else.
    pip("--no-build-isolation", "detectron2")
    run(str(PYTHON), "-c", DETECTRON2_CHECK)


def set_up() -> str:
    """Install whatever is not up to date.

    Returns:
        what to say of a Detectron2 that could not be had, or "". Whatever else fails is raised.
    """
    stamp = Stamp(STAMP)
    torch = stamp.choice("torch", "TORCH")
    detectron2 = stamp.choice("detectron2", "DETECTRON2")
    settings = (ROOT / "setup.cfg").read_bytes() + (ROOT / "pyproject.toml").read_bytes()
    # Each entry begins with what was chosen, as Stamp.choice expects.
    for_torch = [torch, TORCH]
    wanted = {
        "build tools": ["", BUILD_TOOLS],
        "torch": for_torch,
        "detectron2": [detectron2, DETECTRON2, DETECTRON2_COMMIT, *for_torch],
        "package": ["", hashlib.sha256(settings).hexdigest(), str(ROOT), *for_torch],
    }

    def outdated(step: str) -> bool:
        return stamp.steps.get(step) != wanted[step]

    if PYTHON.exists() and not any(map(outdated, wanted)):
        return ""

    ready_made = PYTHON.exists() and not STAMP.exists()
    make_venv(stamp)
    if outdated("build tools"):
        with stamp.step("build tools", wanted["build tools"], "pip and setuptools"):
            pip(*shlex.split(BUILD_TOOLS))
    if outdated("torch"):
        message = f"PyTorch: {torch or TORCH} (several GB, a few minutes)"
        with stamp.step("torch", wanted["torch"], message):
            pip(*shlex.split(torch or TORCH))

    failure = ""
    try:
        if outdated("detectron2"):
            requirement = detectron2_requirement(detectron2 or DETECTRON2)
            check_build_tools(requirement)
            message = f"Detectron2: {requirement} (compiled here, 2 to 10 minutes)"
            with stamp.step("detectron2", wanted["detectron2"], message):
                if detectron2 or not (ready_made and detectron2_works()):
                    install_detectron2(requirement)
    except SetupError as error:
        failure = WITHOUT_DETECTRON2.format(source=detectron2 or DETECTRON2, error=error)

    if outdated("package"):
        message = "this package and its dependencies (a minute or two)"
        with stamp.step("package", wanted["package"], message):
            pip("--no-build-isolation", "--editable", f"{ROOT}[dev]")
    return failure


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--require-detectron2",
        action="store_true",
        help=f"exit with status {MISSING_DETECTRON2} when Detectron2 cannot be had",
    )
    arguments = parser.parse_args()
    try:
        if sys.version_info < OLDEST_PYTHON:
            version = ".".join(map(str, OLDEST_PYTHON))
            raise SetupError(
                f"this is Python {sys.version.split()[0]}; {version} or newer is needed.\n"
                "  Choose another: make PYTHON=python3.11"
            )
        failure = set_up()
    except SetupError as error:
        print(f"[setup] {error}", file=sys.stderr)
        return 1
    if failure:
        print(boxed(failure), file=sys.stderr)
    return MISSING_DETECTRON2 if failure and arguments.require_detectron2 else 0


if __name__ == "__main__":
    sys.exit(main())
