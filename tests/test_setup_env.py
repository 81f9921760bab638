"""tools/setup_env.py against a Python that only notes what it is asked to do."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import setup_env
from setup_env import (
    DETECTRON2_COMMIT,
    MISSING_DETECTRON2,
    SetupError,
    detectron2_requirement,
)

SCRIPT = Path(setup_env.__file__)

# Fails for any command that contains $FAIL_ON, and dies in the middle of one that has $DIE_ON.
FAKE_PYTHON = """#!/bin/sh
echo "$*" >> "{calls}"
[ -n "$DIE_ON" ] && case "$*" in *"$DIE_ON"*) kill -9 $PPID;; esac
[ -n "$FAIL_ON" ] && case "$*" in *"$FAIL_ON"*) echo "$FAIL_WITH"; exit 1;; esac
exit 0
"""

# Stands for the standard library's venv: it makes the fake Python.
FAKE_VENV = """
import shutil, sys
from pathlib import Path
python = Path(sys.argv[-1], "bin", "python")
python.parent.mkdir()
shutil.copy({python!r}, python)
"""


class Checkout:
    """A checkout with nothing in it but the script and what it reads."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls_file = root / "calls"
        (root / "tools").mkdir()
        (root / "stubs").mkdir()
        shutil.copy(SCRIPT, root / "tools")
        (root / "setup.cfg").write_text("[metadata]\n")
        (root / "pyproject.toml").write_text("")
        self.fake_python = root / "fake_python"
        self.fake_python.write_text(FAKE_PYTHON.format(calls=self.calls_file))
        self.fake_python.chmod(0o755)
        (root / "stubs/venv.py").write_text(FAKE_VENV.format(python=str(self.fake_python)))

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run the script; afterwards `calls` holds what this run asked of .venv's Python."""
        self.calls_file.unlink(missing_ok=True)
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(self.root / "stubs")}
        return subprocess.run(
            [sys.executable, self.root / "tools/setup_env.py", *arguments],
            env={**environment, **variables},
            capture_output=True,
            text=True,
        )

    def make(self, target: str, fail_on: str) -> subprocess.CompletedProcess[str]:
        """make, with a Python in .venv that fails for what contains one of several words."""
        shutil.copy(SCRIPT.parents[1] / "Makefile", self.root)
        test = "".join(f'*"{word}"*) echo failed; exit 1;; ' for word in fail_on.split("|"))
        lines = f'#!/bin/sh\necho "$*" >> "{self.calls_file}"\ncase "$*" in {test}esac\n'
        self.fake_python.write_text(lines)
        return subprocess.run(
            ["make", target, f"PYTHON={sys.executable}"],
            cwd=self.root,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(self.root / "stubs")},
            capture_output=True,
            text=True,
        )

    @property
    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []

    @property
    def installed(self) -> list[str]:
        """What pip was asked to install, one of "tools", "torch", "detectron2", "package" each."""
        marks = {
            "setuptools": "tools",
            "torchvision": "torch",
            "--force-reinstall": "detectron2",
            "--editable": "package",
        }
        return [name for call in self.calls for mark, name in marks.items() if mark in call]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


ALL = ["tools", "torch", "detectron2", "package"]


def test_installs_all_in_order_and_then_nothing(checkout: Checkout) -> None:
    first = checkout.run("--require-detectron2")
    assert first.returncode == 0, first.stderr
    assert checkout.installed == ALL
    build, dependencies = (
        call for call in checkout.calls if "detectron2" in call and "pip" in call
    )
    assert build.endswith(f"detectron2.git@{DETECTRON2_COMMIT}")
    assert "--no-cache-dir" in build, "a cached build may be one against another PyTorch"
    assert dependencies.endswith(" detectron2")
    start = time.monotonic()
    second = checkout.run("--require-detectron2")
    assert second.returncode == 0
    assert checkout.calls == []
    assert time.monotonic() - start < 3


def test_changed_settings_reinstall_the_package_alone(checkout: Checkout) -> None:
    checkout.run()
    (checkout.root / "setup.cfg").write_text("[metadata]\nname = other\n")
    checkout.run()
    assert checkout.installed == ["package"]


def test_another_torch_rebuilds_what_is_compiled_against_it(checkout: Checkout) -> None:
    checkout.run()
    checkout.run(TORCH="torch==2.0 torchvision==0.15 --index-url https://example.org/cpu")
    assert checkout.installed == ["torch", "detectron2", "package"]
    assert any("--index-url https://example.org/cpu" in call for call in checkout.calls)
    checkout.run()
    assert checkout.calls == [], "the choice is kept when none is given"


def test_another_detectron2_is_installed_and_kept(checkout: Checkout) -> None:
    checkout.run()
    clone = checkout.root / "clone"
    clone.mkdir()
    (clone / "setup.py").write_text("")
    checkout.run(DETECTRON2=str(clone))
    assert checkout.installed == ["detectron2"]
    assert any(call.endswith(f" {clone}") for call in checkout.calls)
    shutil.rmtree(clone)
    assert checkout.run().returncode == 0
    assert checkout.calls == []


@pytest.mark.parametrize("step", ["setuptools", "torchvision", "--editable"])
def test_a_step_that_fails_stops_and_is_repeated(checkout: Checkout, step: str) -> None:
    result = checkout.run(FAIL_ON=step, FAIL_WITH="No space left on device")
    assert result.returncode == 1
    assert "| No space left on device" in result.stderr
    assert "the disk is full" in result.stderr
    assert "setup.log" in result.stderr
    failed = checkout.installed[-1]
    assert checkout.run().returncode == 0
    assert checkout.installed == ALL[ALL.index(failed) :]


@pytest.mark.parametrize("step", ["torchvision", "--force-reinstall", "--editable"])
def test_a_step_that_is_killed_is_repeated(checkout: Checkout, step: str) -> None:
    assert checkout.run(DIE_ON=step).returncode != 0
    killed = checkout.installed[-1]
    assert checkout.run().returncode == 0
    assert checkout.installed == ALL[ALL.index(killed) :]


def test_a_step_that_is_killed_when_done_again_is_repeated(checkout: Checkout) -> None:
    """The stamp of the finished first time must not vouch for the second."""
    checkout.run()
    (checkout.root / "setup.cfg").write_text("[metadata]\nname = other\n")
    checkout.run(DIE_ON="--editable")
    (checkout.root / "setup.cfg").write_text("[metadata]\n")
    checkout.run()
    assert checkout.installed == ["package"]


def test_without_detectron2_the_rest_is_installed(checkout: Checkout) -> None:
    variables = {"FAIL_ON": "git+https", "FAIL_WITH": "fatal: Could not resolve host: github.com"}
    result = checkout.run(**variables)
    assert result.returncode == 0
    assert checkout.installed == ALL
    frame = "\n" + 100 * "#" + "\n"
    _, box, _ = result.stderr.split(frame)
    for part in ("git+https://", "Could not resolve host", "HTTPS_PROXY", "DETECTRON2=<"):
        assert part in box
    assert "`make quickstart` runs the reference on torchvision" in box
    assert checkout.run("--require-detectron2", **variables).returncode == MISSING_DETECTRON2
    assert checkout.installed == ["detectron2"]
    assert checkout.run("--require-detectron2").returncode == 0
    assert checkout.installed == ["detectron2"]


def test_a_detectron2_that_cannot_be_imported_is_not_taken_for_installed(
    checkout: Checkout,
) -> None:
    result = checkout.run("--require-detectron2", FAIL_ON="_C", FAIL_WITH="undefined symbol: _ZN")
    assert result.returncode == MISSING_DETECTRON2
    assert "another PyTorch" in result.stderr
    checkout.run()
    assert checkout.installed == ["detectron2"]


@pytest.mark.parametrize(
    ("fail_on", "ran", "code"),
    [
        ("nothing", "tools/quickstart.py", 0),
        ("git+https", "examples/torchvision_reference.py", 0),
        ("git+https|examples/", "examples/torchvision_reference.py", 2),
        ("torchvision==", "", 2),
        ("--editable", "", 2),
        ("tools/quickstart.py", "tools/quickstart.py", 2),
    ],
)
def test_the_quickstart_falls_back_to_the_reference(
    checkout: Checkout, fail_on: str, ran: str, code: int
) -> None:
    """Only for a Detectron2 that cannot be had; its own failure is the quickstart's."""
    result = checkout.make("quickstart", fail_on)
    assert result.returncode == code, result.stdout + result.stderr
    scripts = [call for call in checkout.calls if re.match("tools/q|examples/", call)]
    assert scripts == ([ran] if ran else [])
    instead = "running the reference on torchvision, examples/torchvision_reference.py, instead"
    assert (instead in result.stdout) == ("git+https" in fail_on)
    assert ("NO DETECTRON2" in result.stderr) == ("git+https" in fail_on)


def test_setup_and_lint_go_on_without_detectron2(checkout: Checkout) -> None:
    assert checkout.make("setup", "git+https").returncode == 0
    assert checkout.make("lint", "git+https").returncode == 0
    assert "-m mypy" in checkout.calls


def test_a_wrong_source_leaves_the_working_detectron2_alone(checkout: Checkout) -> None:
    checkout.run()
    result = checkout.run("--require-detectron2", DETECTRON2="/nowhere")
    assert result.returncode == MISSING_DETECTRON2
    assert "could not be had from /nowhere" in result.stderr
    assert "neither a clone" in result.stderr
    assert checkout.run("--require-detectron2").returncode == 0
    assert checkout.installed == []


@pytest.mark.parametrize(
    ("there", "complaint"), [((), "git is missing"), (("git",), "no C++ compiler")]
)
def test_missing_build_tools_are_named(
    checkout: Checkout, there: tuple[str, ...], complaint: str
) -> None:
    tools = checkout.root / "bin"
    tools.mkdir()
    for tool in there:
        (tools / tool).write_text("#!/bin/sh\n")
        (tools / tool).chmod(0o755)
    checkout.run()  # creates .venv
    (checkout.root / ".venv/setup.json").write_text("{}")
    result = checkout.run("--require-detectron2", PATH=str(tools))
    assert result.returncode == MISSING_DETECTRON2
    assert complaint in result.stderr
    assert checkout.installed == ["tools", "torch", "package"]


def test_a_wheel_needs_no_compiler(checkout: Checkout) -> None:
    wheel = checkout.root / "detectron2-0.6-py3-none-any.whl"
    wheel.write_text("")
    result = checkout.run("--require-detectron2", DETECTRON2=str(wheel), PATH="/nowhere:/bin")
    assert result.returncode == 0, result.stderr
    assert checkout.installed == ALL


@pytest.mark.parametrize(
    ("variables", "installed"),
    [
        ({}, ["tools", "torch", "package"]),
        ({"DETECTRON2": "https://example.org/d2"}, ALL),
        ({"FAIL_ON": "_C"}, ALL),
    ],
    ids=["works", "another is asked for", "does not work"],
)
def test_a_ready_made_environment_keeps_a_detectron2_that_works(
    checkout: Checkout, variables: dict[str, str], installed: list[str]
) -> None:
    python = checkout.root / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    shutil.copy(checkout.fake_python, python)
    assert checkout.run(**variables).returncode == 0
    assert checkout.installed == installed


def test_a_foreign_environment_without_pip_is_not_removed(checkout: Checkout) -> None:
    precious = checkout.root / ".venv/precious"
    precious.parent.mkdir()
    precious.write_text("")
    result = checkout.run()
    assert result.returncode == 1
    assert "not made by this script" in result.stderr
    assert precious.exists()


def test_a_half_made_environment_is_made_again(checkout: Checkout) -> None:
    stubs = checkout.root / "stubs/venv.py"
    text = stubs.read_text()
    stubs.write_text("raise SystemExit('interrupted')")
    result = checkout.run()
    assert result.returncode == 1
    assert "interrupted" in result.stderr
    stubs.write_text(text)
    assert checkout.run().returncode == 0
    assert checkout.installed == ALL


def test_a_damaged_stamp_repeats_every_step(checkout: Checkout) -> None:
    checkout.run()
    stamp = checkout.root / ".venv/setup.json"
    stamp.write_text(stamp.read_text()[:-10])
    assert checkout.run().returncode == 0
    assert checkout.installed == ALL
    assert set(json.loads(stamp.read_text())) == {"build tools", "torch", "detectron2", "package"}


def test_old_pythons_are_refused(monkeypatch, capsys) -> None:
    monkeypatch.setattr(setup_env, "OLDEST_PYTHON", (99, 0))
    monkeypatch.setattr(sys, "argv", ["setup_env.py"])
    assert setup_env.main() == 1
    assert "99.0 or newer is needed" in capsys.readouterr().err


def test_a_python_without_venv_is_named(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(setup_env, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(setup_env, "PYTHON", tmp_path / ".venv/bin/python")
    monkeypatch.setattr(
        setup_env.importlib.util, "find_spec", lambda name: None if name == "ensurepip" else name
    )
    with pytest.raises(SetupError, match="python3-venv"):
        setup_env.make_venv(setup_env.Stamp(tmp_path / "setup.json"))
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize(
    ("source", "requirement"),
    [
        ("https://example.org/d2.git", f"git+https://example.org/d2.git@{DETECTRON2_COMMIT}"),
        ("git+https://example.org/d2", f"git+https://example.org/d2@{DETECTRON2_COMMIT}"),
        ("https://example.org/d2.git@main", "git+https://example.org/d2.git@main"),
        ("https://example.org/d2.git@fix/one", "git+https://example.org/d2.git@fix/one"),
        ("ssh://git@example.org/d2", f"git+ssh://git@example.org/d2@{DETECTRON2_COMMIT}"),
        ("file:///srv/d2", f"git+file:///srv/d2@{DETECTRON2_COMMIT}"),
    ],
)
def test_urls_are_pinned_unless_they_name_a_commit(source: str, requirement: str) -> None:
    assert detectron2_requirement(source) == requirement


def test_paths_are_made_absolute(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clone").mkdir()
    (tmp_path / "d2.whl").write_text("")
    with pytest.raises(SetupError, match="neither a clone"):
        detectron2_requirement("clone")
    (tmp_path / "clone/setup.py").write_text("")
    assert detectron2_requirement("clone") == str(tmp_path / "clone")
    assert detectron2_requirement("d2.whl") == str(tmp_path / "d2.whl")
    with pytest.raises(SetupError, match="neither a clone"):
        detectron2_requirement("absent.whl")


def test_compilers_are_limited_by_memory(monkeypatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": (8 << 30) // 4096}
    monkeypatch.setattr(os, "sysconf", pages.get)
    assert setup_env.build_jobs() == 4
    pages["SC_PHYS_PAGES"] = 1
    assert setup_env.build_jobs() == 1
