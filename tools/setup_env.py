#!/usr/bin/env python3
"""Create `.venv` and install everything the project needs. Quick when nothing has changed.

    python3 tools/setup_env.py [dev]

"dev" adds what the tests and checks need.
Environment variables change what is installed. A choice is kept until you make another one.

    DETECTRON2   "pypi": the copy from the package index, without compiled kernels;
                 "github": the pinned official commit, compiled here;
                 or a clone's directory, a wheel or a git URL.
                 Default: "github" if it can be built here, otherwise "pypi".
    TORCH        pip arguments that replace the pinned versions, such as
                 "torch==2.14.1 torchvision==0.29.1 --index-url <URL>"
    VENV         the environment's folder. Default: .venv

This file uses the standard library only, because it runs before anything is installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / (os.environ.get("VENV") or ".venv")
PYTHON = VENV / "bin" / "python"
LOG = VENV / "setup.log"
STAMP = VENV / "setup.json"

OLDEST_PYTHON = (3, 10)
# detectron2.model_zoo imports pkg_resources, which setuptools 82 dropped; PyTorch needs 77.0.3.
SETUPTOOLS = "setuptools>=77.0.3,<81"
BUILD_TOOLS = ["pip>=22", "wheel", SETUPTOOLS]
TORCH = "torch==2.14.1 torchvision==0.29.1"

GITHUB = "https://github.com/facebookresearch/detectron2.git"
COMMIT = "02b5c4e295e990042a714712c21dc79b731e8833"
TIMEOUT = 5  # seconds in which GitHub has to answer
# The Python files of Detectron2's commit a59f056 (17 April 2024), with model_zoo's configs. Its
# compiled extension is for one Python version, unchecked and not needed: it is never unpacked.
INDEX_WHEEL = "sal-detectron2==0.7.2"
INDEX_WHEEL_SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
# Installed as "detectron2", so that pip replaces the copy by an official build and vice versa.
COPY_VERSION = "0.6+sal.0.7.2"
COPY_NEEDS = ["Pillow>=7.1", "matplotlib", "pycocotools>=2.0.2", "termcolor>=1.1", "yacs>=0.1.8"]
COPY_NEEDS += ["tabulate", "cloudpickle", "tqdm>4.29.0", "tensorboard", "fvcore>=0.1.5,<0.1.6"]
COPY_NEEDS += ["iopath>=0.1.7", "omegaconf>=2.1,<2.4", "hydra-core>=1.1", "packaging", SETUPTOOLS]
COPY_PYPROJECT = f"""\
[project]
name = "detectron2"
version = "{COPY_VERSION}"
description = "Python files of Detectron2, from {INDEX_WHEEL}, without compiled kernels"
license-files = ["*/LICENSE"]
dependencies = {COPY_NEEDS}
[tool.setuptools]
packages.find.include = ["detectron2*"]
package-data."detectron2.model_zoo" = ["configs/**/*"]
"""
# Compiled kernels may be missing. If they are there, they have to fit PyTorch.
DETECTRON2_CHECK = """\
import importlib.util, torch, detectron2.model_zoo
if importlib.util.find_spec("detectron2._C"): import detectron2._C
"""

# Pattern in the output of pip -> what to do.
HINTS = {
    "resolve host|name resolution|unable to access|Failed to connect|timed out|NewConnection": (
        "check the network; behind a proxy, set HTTPS_PROXY"
    ),
    "No matching distribution": "the package index has no build for this Python and system",
    "DO NOT MATCH THE HASHES": "the package index has another file of this name; do not use it",
    "No such file or directory: '[cg]\\+\\+'": "install a C++ compiler (apt install g++)",
    r"Python\.h": "install Python's headers: python3-dev (python3-devel on Fedora)",
    "not our ref|not a tree|did not match any": "name a commit: DETECTRON2=<URL>@<commit>",
    "Killed|out of memory": "not enough memory to compile; try again with MAX_JOBS=1",
    "No space left": "the disk is full; PyTorch with CUDA takes about 6 GB",
}


class SetupError(Exception):
    """What went wrong, and what to do about it."""


class Stamp:
    """The finished steps, each with its inputs, of which the first is the user's choice.

    A step's entry is removed before the step starts and written after it has succeeded, so that an
    interrupted step is repeated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.steps: dict[str, list[str]] = {}
        # Without a readable stamp all steps are repeated.
        with suppress(FileNotFoundError, ValueError):
            self.steps = json.loads(path.read_text())

    def write(self) -> None:
        # Replaced atomically, so that an interruption leaves the old stamp or the new one.
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.steps, indent=1))
        new.replace(self.path)

    def choice(self, step: str, variable: str) -> str:
        """The user's choice, now or when the step was last done; empty for the default."""
        return os.environ.get(variable) or self.steps.get(step, [""])[0]

    def run(self, step: str, inputs: list[str], action: Callable[[], None]) -> None:
        """Run a step, unless it has succeeded with the same inputs."""
        if self.steps.get(step) == inputs:
            return
        say(f"installing {step} ...")
        start = time.monotonic()
        self.steps.pop(step, None)
        self.write()
        action()
        self.steps[step] = inputs
        self.write()
        say(f"    done in {time.monotonic() - start:.0f} s")


def say(message: str) -> None:
    print(f"[setup] {message}", flush=True)


def run(*command: str) -> None:
    """Run a command. Its output goes to the log; an error quotes the last lines."""
    with LOG.open("a+", errors="replace") as log:
        log.write(f"\n$ {shlex.join(command)}\n")
        log.flush()
        start = log.tell()
        code = subprocess.call(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        log.seek(start)
        output = log.read()
    if code:
        lines = [f"  | {line}" for line in output.splitlines() if line.strip()][-12:]
        hints = [f"  likely: {HINTS[pattern]}" for pattern in HINTS if re.search(pattern, output)]
        first, last = f"this failed: {shlex.join(command)}", f"  (all of its output: {LOG})"
        raise SetupError("\n".join([first, *lines, last, *hints]))


def pip(command: str, *arguments: str) -> None:
    # Python compiles a module when it is first imported. pip would compile all of them, which takes
    # longer than everything else but the download of PyTorch.
    options = ["--no-compile"] if command == "install" else []
    options += ["--disable-pip-version-check", "--no-input"]
    run(str(PYTHON), "-m", "pip", command, *options, *arguments)


def make_venv(stamp: Stamp) -> None:
    """Create the environment, unless there is one that works."""
    check = f"import pip, sys; sys.exit(sys.version_info < {OLDEST_PYTHON})"
    if PYTHON.exists() and not subprocess.call([PYTHON, "-c", check], stderr=subprocess.DEVNULL):
        return
    if VENV.exists() and not STAMP.exists():
        raise SetupError(f"{VENV} was not made by this script and does not work: remove it")
    if not all(importlib.util.find_spec(module) for module in ("venv", "ensurepip")):
        problem = f"{sys.executable} lacks the venv module"
        raise SetupError(f"{problem}: apt install python3-venv, or use another: make PYTHON=...")
    say(f"creating {VENV} with Python {sys.version.split()[0]}")
    shutil.rmtree(VENV, ignore_errors=True)
    VENV.mkdir(parents=True)
    stamp.steps = {}
    stamp.write()
    run(sys.executable, "-m", "venv", str(VENV))


def choose_detectron2(choice: str) -> tuple[str, str]:
    """What pip has to install, empty for the copy from the package index, and why."""
    if choice == "pypi":
        return "", "DETECTRON2=pypi"
    if choice:
        return build_requirement(choice), f"DETECTRON2={choice}"
    problem = why_not_github()
    return "" if problem else build_requirement("github"), problem or "GitHub answers"


def build_requirement(source: str) -> str:
    """What pip has to install for a clone's directory, a wheel, a git URL or "github"."""
    url = GITHUB if source == "github" else source.removeprefix("git+")
    if "://" in url:
        # An @ in the host part is for a user name, one in the path for a commit or branch.
        return f"git+{url}" if "@" in urlsplit(url).path else f"git+{url}@{COMMIT}"
    path = Path(source).expanduser().resolve()
    if (path / "setup.py").is_file() or (path.suffix == ".whl" and path.is_file()):
        return str(path)
    raise SetupError(
        f"DETECTRON2={source} is neither pypi, github nor a git URL,\n"
        f"  and {path} is neither a clone of Detectron2 nor a wheel."
    )


def why_not_github() -> str:
    """Why the official commit cannot be built here; empty if it probably can."""
    if not shutil.which("git"):
        return "git is missing"
    if not os.environ.get("CXX") and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return "there is no C++ compiler"
    command, null = ["git", "ls-remote", GITHUB, "HEAD"], subprocess.DEVNULL
    try:
        code = subprocess.call(command, stdin=null, stdout=null, stderr=null, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return f"GitHub does not answer within {TIMEOUT} s"
    return "GitHub cannot be reached" if code else ""


def set_up_detectron2(choice: str, requirement: str, reason: str) -> None:
    """Install Detectron2. Unless the user made a choice, the copy replaces a build that fails."""
    if requirement:
        say(f"Detectron2: {requirement} ({reason}); compiling takes 2 to 10 minutes")
        try:
            return install_detectron2(requirement)
        except SetupError as error:
            if choice:
                raise SetupError(f"{error}\n  DETECTRON2=pypi needs no compiler.") from error
            say(str(error))
            reason = "the official commit could not be installed"
    say(f"Detectron2: {INDEX_WHEEL} from the package index ({reason})")
    try:
        with tempfile.TemporaryDirectory() as folder:
            build_copy(Path(folder))
            # By name, so that pip records no path of this temporary folder.
            source = ("--no-index", f"--find-links={folder}")
            install_detectron2(*source, f"detectron2=={COPY_VERSION}")
    except SetupError as error:
        raise SetupError(
            f"Detectron2 could not be installed. {INDEX_WHEEL} was tried ({reason}):\n{error}\n"
            "  For another source: make <target> DETECTRON2=<source>, where <source> is github,\n"
            "  a clone's directory, a wheel or a git URL."
        ) from error


def install_detectron2(*requirement: str) -> None:
    # --no-build-isolation: the build imports the torch that it is compiled for.
    # --no-cache-dir: the cache may hold a build for another torch.
    # --force-reinstall: the version number is the same for every commit.
    options = ("--no-build-isolation", "--no-cache-dir", "--force-reinstall", "--no-deps")
    pip("install", *options, *requirement)
    pip("install", "--no-build-isolation", "detectron2")  # its dependencies
    run(str(PYTHON), "-c", DETECTRON2_CHECK)


def build_copy(folder: Path) -> None:
    """Make a wheel for any Python from the one on the package index."""
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{INDEX_WHEEL} --hash=sha256:{INDEX_WHEEL_SHA256}\n")
    # The wheel claims to be for Python 3.10, which is true of its compiled files only.
    options = ("--python-version=3.10", "--only-binary=:all:", "--no-deps", "--require-hashes")
    pip("download", *options, f"--dest={folder}", f"--requirement={pinned}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        wanted = r"detectron2/.*\.(py|yaml)|[^/]*/LICENSE"
        archive.extractall(folder, [n for n in archive.namelist() if re.fullmatch(wanted, n)])
    wheel.unlink()
    (folder / "pyproject.toml").write_text(COPY_PYPROJECT)
    pip("wheel", "--no-build-isolation", "--no-deps", f"--wheel-dir={folder}", str(folder))


def set_up(dev: bool) -> None:
    """Install whatever is not up to date."""
    if sys.version_info < OLDEST_PYTHON:
        version = sys.version.split()[0]
        raise SetupError(f"Python {version} is too old; choose another: make PYTHON=python3.11")
    stamp = Stamp(STAMP)
    torch = stamp.choice("torch", "TORCH")
    detectron2 = stamp.choice("detectron2", "DETECTRON2")
    settings = (ROOT / "setup.cfg").read_bytes() + (ROOT / "pyproject.toml").read_bytes()
    for_torch = [torch, TORCH]
    wanted = {
        "build tools": ["", *BUILD_TOOLS],
        "torch": for_torch,
        "package": ["", hashlib.sha256(settings).hexdigest(), str(ROOT), *for_torch],
        "detectron2": [detectron2, COMMIT, COPY_VERSION, *for_torch],
    }
    if dev or "dev" in stamp.steps:
        wanted["dev"] = wanted["package"]
    if PYTHON.exists() and stamp.steps == wanted:
        return
    ready_made = PYTHON.exists() and not STAMP.exists()
    make_venv(stamp)
    # Decided before anything is installed, so that a mistake in DETECTRON2 changes nothing.
    done = stamp.steps.get("detectron2") == wanted["detectron2"]
    source = ("", "") if done else choose_detectron2(detectron2)

    def detectron2_step() -> None:
        check = [str(PYTHON), "-c", DETECTRON2_CHECK]
        if detectron2 or not ready_made or subprocess.call(check, stderr=subprocess.DEVNULL):
            set_up_detectron2(detectron2, *source)

    editable = ("--no-build-isolation", "--editable")
    actions: dict[str, Callable[[], None]] = {
        "build tools": lambda: pip("install", *BUILD_TOOLS),
        "torch": lambda: pip("install", *shlex.split(torch or TORCH)),
        # With what Detectron2 needs, because one call of pip is quicker than two.
        "package": lambda: pip("install", *COPY_NEEDS, *editable, str(ROOT)),
        "detectron2": detectron2_step,
        "dev": lambda: pip("install", *editable, f"{ROOT}[dev]"),
    }
    for step, inputs in wanted.items():
        stamp.run(step, inputs, actions[step])


if __name__ == "__main__":
    if {"-h", "--help"}.intersection(sys.argv[1:]):
        print(__doc__)
        sys.exit()
    os.environ["GIT_TERMINAL_PROMPT"] = "0"
    try:
        set_up(dev="dev" in sys.argv[1:])
    except SetupError as error:
        sys.exit(f"[setup] {error}")
