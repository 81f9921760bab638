"""tools/setup_env.py with a fake git and a fake Python, which only record how they are called."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

import setup_env
from setup_env import COMMIT, COPY_VERSION, INDEX_WHEEL, SetupError, build_requirement

SCRIPT = Path(setup_env.__file__)
WHEEL = "sal_detectron2-0.7.2-cp310-none-any.whl"

# Fails for any command that contains $FAIL_ON, and is killed in the middle of one with $DIE_ON.
# "pip download" copies the wheel; "pip wheel" of a folder keeps a copy of it.
FAKE_PYTHON = """#!/bin/sh
echo "$*" >> "{root}/calls"
[ -n "$DIE_ON" ] && case "$*" in *"$DIE_ON"*) kill -9 $PPID;; esac
[ -n "$FAIL_ON" ] && case "$*" in *$FAIL_ON*) echo "$FAIL_WITH"; exit 1;; esac
for word in "$@"; do
    case "$word" in --dest=*) cp "{root}/{wheel}" "${{word#--dest=}}";; esac
    [ "$word" = wheel ] && build=1
    [ -n "$build" ] && [ -f "$word/pyproject.toml" ] && cp -r "$word" "{root}/installed"
done
exit 0
"""

# Used instead of the standard library's venv: creates the fake Python.
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
        for folder in ("tools", "stubs", "bin"):
            (root / folder).mkdir()
        shutil.copy(SCRIPT, root / "tools")
        (root / "setup.cfg").write_text("[metadata]\n")
        (root / "pyproject.toml").write_text("")
        self.fake_python = root / "fake_python"
        self.fake_python.write_text(FAKE_PYTHON.format(root=root, wheel=WHEEL))
        self.fake_python.chmod(0o755)
        (root / "stubs/venv.py").write_text(FAKE_VENV.format(python=str(self.fake_python)))
        with zipfile.ZipFile(root / WHEEL, "w") as wheel:
            for name in (
                "detectron2/__init__.py",
                "detectron2/_C.cpython-310-x86_64-linux-gnu.so",
                "detectron2/model_zoo/configs/LVISv0.5/r.yaml",
                "sal_detectron2-0.7.2.dist-info/LICENSE",
                "sal_detectron2-0.7.2.dist-info/METADATA",
                "tools/train_net.py",
            ):
                wheel.writestr(name, "")
        for tool in ("sh", "cp", "make", "sleep"):
            (root / "bin" / tool).symlink_to(shutil.which(tool))
        self.program("git", f'echo "git $*" >> "{self.calls_file}"')
        self.program("g++", "")

    def program(self, name: str, text: str) -> None:
        """Put a program on the PATH."""
        (self.root / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (self.root / "bin" / name).chmod(0o755)

    @property
    def environment(self) -> dict[str, str]:
        return {"PATH": str(self.root / "bin"), "PYTHONPATH": str(self.root / "stubs")}

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run the script. `calls` then holds what this run asked of git and .venv's Python."""
        self.calls_file.unlink(missing_ok=True)
        return subprocess.run(
            [sys.executable, self.root / "tools/setup_env.py", *arguments],
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
        )

    def make(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        shutil.copy(SCRIPT.parents[1] / "Makefile", self.root)
        return subprocess.run(
            ["make", *arguments, f"PYTHON={sys.executable}"],
            cwd=self.root,
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
        )

    @property
    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []

    @property
    def installed(self) -> list[str]:
        """What pip was asked to install: "tools", "torch", "package", "detectron2", "dev"."""
        marks = {
            "wheel setuptools": "tools",
            "torchvision": "torch",
            "--force-reinstall": "detectron2",
            "[dev]": "dev",
            "--editable": "package",
        }
        calls = [call for call in self.calls if "pip install" in call]
        found = [next((marks[m] for m in marks if m in call), "") for call in calls]
        return [name for name in found if name]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


ALL = ["tools", "torch", "package", "detectron2"]
OFFICIAL = f"git+https://github.com/facebookresearch/detectron2.git@{COMMIT}"
COPY_LINE = f"Detectron2: {INDEX_WHEEL} from the package index"


# --- what is installed, and when ------------------------------------------------------------------


def test_installs_everything_once(checkout: Checkout) -> None:
    first = checkout.run()
    assert first.returncode == 0, first.stderr
    assert checkout.installed == ALL
    start = time.monotonic()
    assert checkout.run().returncode == 0
    assert checkout.calls == []
    assert time.monotonic() - start < 3


def test_dev_adds_what_tests_need(checkout: Checkout) -> None:
    assert checkout.run("dev").returncode == 0
    assert checkout.installed == [*ALL, "dev"]
    assert checkout.run().returncode == 0
    assert checkout.calls == []
    (checkout.root / "setup.cfg").write_text("[metadata]\nname = other\n")
    assert checkout.run().returncode == 0
    assert checkout.installed == ["package", "dev"]


@pytest.mark.parametrize(
    ("target", "script"),
    [("quickstart", "tools/quickstart.py"), ("test", "-m pytest -q -n 2 -m not slow")],
)
def test_make_sets_up_and_then_runs(checkout: Checkout, target: str, script: str) -> None:
    result = checkout.make(target)
    assert result.returncode == 0, result.stderr
    assert checkout.calls[-1] == script
    assert checkout.installed == ALL + ["dev"] * (target == "test")


@pytest.mark.parametrize("fail_on", ["torchvision", "--editable", "tools/quickstart.py"])
def test_make_fails_when_a_step_fails(checkout: Checkout, fail_on: str) -> None:
    assert checkout.make("quickstart", FAIL_ON=fail_on).returncode == 2
    assert fail_on in checkout.calls[-1]


def test_another_folder_for_the_environment(checkout: Checkout) -> None:
    result = checkout.make("quickstart", "VENV=env/official")
    assert result.returncode == 0, result.stderr
    assert (checkout.root / "env/official/setup.json").is_file()
    assert not (checkout.root / ".venv").exists()
    assert "env/official/bin/python tools/quickstart.py" in result.stdout


def test_changed_settings_reinstall_only_the_package(checkout: Checkout) -> None:
    checkout.run()
    (checkout.root / "setup.cfg").write_text("[metadata]\nname = other\n")
    checkout.run()
    assert checkout.installed == ["package"]


def test_another_torch_reinstalls_what_depends_on_it(checkout: Checkout) -> None:
    checkout.run()
    checkout.run(TORCH="torch==2.0 torchvision==0.15 --index-url https://example.org/cpu")
    assert checkout.installed == ["torch", "package", "detectron2"]
    assert any("--index-url https://example.org/cpu" in call for call in checkout.calls)
    checkout.run()
    assert checkout.calls == [], "a choice is kept until another one is made"


@pytest.mark.parametrize("step", ["setuptools", "torchvision", "--editable"])
def test_a_failed_step_stops_the_setup_and_is_repeated(checkout: Checkout, step: str) -> None:
    result = checkout.run(FAIL_ON=step, FAIL_WITH="No space left on device")
    assert result.returncode == 1
    assert "| No space left on device" in result.stderr
    assert "the disk is full" in result.stderr
    assert "setup.log" in result.stderr
    failed = checkout.installed[-1]
    assert checkout.run().returncode == 0
    assert checkout.installed == ALL[ALL.index(failed) :]


@pytest.mark.parametrize("step", ["torchvision", "--editable", "--force-reinstall"])
def test_a_killed_step_is_repeated(checkout: Checkout, step: str) -> None:
    assert checkout.run(DIE_ON=step).returncode != 0
    killed = checkout.installed[-1]
    assert checkout.run().returncode == 0
    assert checkout.installed == ALL[ALL.index(killed) :]


def test_a_step_killed_in_its_second_run_is_repeated(checkout: Checkout) -> None:
    """The stamp of the first run must not stand for the second one."""
    checkout.run()
    (checkout.root / "setup.cfg").write_text("[metadata]\nname = other\n")
    checkout.run(DIE_ON="--editable")
    (checkout.root / "setup.cfg").write_text("[metadata]\n")
    checkout.run()
    assert checkout.installed == ["package"]


def test_a_damaged_stamp_repeats_every_step(checkout: Checkout) -> None:
    checkout.run()
    stamp = checkout.root / ".venv/setup.json"
    stamp.write_text(stamp.read_text()[:-10])
    assert checkout.run().returncode == 0
    assert checkout.installed == ALL
    assert set(json.loads(stamp.read_text())) == {"build tools", "torch", "package", "detectron2"}


# --- where Detectron2 comes from ------------------------------------------------------------------


def test_the_official_commit_if_github_answers_and_there_is_a_compiler(checkout: Checkout) -> None:
    result = checkout.run()
    assert f"Detectron2: {OFFICIAL} (GitHub answers" in result.stdout
    (build,) = (call for call in checkout.calls if "--force-reinstall" in call)
    assert build.endswith(OFFICIAL)
    assert "--no-cache-dir" in build, "the cache may hold a build for another PyTorch"
    assert not any("pip download" in call for call in checkout.calls)


@pytest.mark.parametrize(
    ("remove", "git", "reason"),
    [
        ("git", "", "git is missing"),
        ("g++", "", "there is no C++ compiler"),
        ("", "exit 128", "GitHub cannot be reached"),
        ("", "exec sleep 60", "GitHub does not answer within 1 s"),
    ],
)
def test_the_index_copy_otherwise(checkout: Checkout, remove: str, git: str, reason: str) -> None:
    script = checkout.root / "tools/setup_env.py"
    script.write_text(script.read_text().replace("TIMEOUT = 5", "TIMEOUT = 1"))
    if git:
        checkout.program("git", git)
    if remove:
        (checkout.root / "bin" / remove).unlink()
    result = checkout.run()
    assert result.returncode == 0, result.stderr
    assert f"{COPY_LINE} ({reason})" in result.stdout
    assert checkout.installed == ALL
    checkout.program("git", f'echo "git $*" >> "{checkout.calls_file}"')
    checkout.program("g++", "")
    assert checkout.run().returncode == 0
    assert checkout.calls == [], "GitHub is not tried again"


def test_pypi_can_be_chosen_and_is_kept(checkout: Checkout) -> None:
    result = checkout.run(DETECTRON2="pypi")
    assert f"{COPY_LINE} (DETECTRON2=pypi)" in result.stdout
    assert not any(call.startswith("git") for call in checkout.calls)
    checkout.run()
    assert checkout.calls == []
    (checkout.root / "setup.cfg").write_text("[metadata]\nname = other\n")
    checkout.run()
    assert checkout.installed == ["package"]


def test_pypi_can_replace_an_official_build_and_the_other_way_around(checkout: Checkout) -> None:
    for choice in ("github", "pypi", "github"):
        assert checkout.run(DETECTRON2=choice).returncode == 0
        assert checkout.installed[-1] == "detectron2"
        (call,) = (call for call in checkout.calls if "--force-reinstall" in call)
        assert call.endswith(OFFICIAL) == (choice == "github")


def test_the_copy_is_downloaded_by_its_hash_for_any_python(checkout: Checkout) -> None:
    checkout.run(DETECTRON2="pypi")
    (download,) = (call for call in checkout.calls if "pip download" in call)
    for option in ("--python-version=3.10", "--only-binary=:all:", "--no-deps", "--require-hashes"):
        assert option in download
    requirement = (checkout.root / "installed/requirements.txt").read_text()
    assert re.fullmatch(r"sal-detectron2==0\.7\.2 --hash=sha256:[0-9a-f]{64}\n", requirement)


def test_compiled_files_are_never_unpacked(checkout: Checkout) -> None:
    checkout.run(DETECTRON2="pypi")
    folder = checkout.root / "installed"
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert files == {
        "requirements.txt",
        "pyproject.toml",
        "detectron2/__init__.py",
        "detectron2/model_zoo/configs/LVISv0.5/r.yaml",
        "sal_detectron2-0.7.2.dist-info/LICENSE",
    }


def test_pip_list_says_what_the_copy_is(checkout: Checkout) -> None:
    checkout.run(DETECTRON2="pypi")
    lines = (checkout.root / "installed/pyproject.toml").read_text().splitlines()
    assert 'name = "detectron2"' in lines
    assert f'version = "{COPY_VERSION}"' in lines
    assert COPY_VERSION == "0.6+sal.0.7.2"
    (call,) = (call for call in checkout.calls if "--force-reinstall" in call)
    assert call.endswith(f" detectron2=={COPY_VERSION}"), "pip freeze shows no temporary folder"
    (needs,) = (line for line in lines if line.startswith("dependencies = "))
    assert "fvcore" in needs and "numpy" not in needs and "black" not in needs


def test_another_file_under_the_name_of_the_copy_is_refused(checkout: Checkout) -> None:
    message = "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE."
    result = checkout.run(DETECTRON2="pypi", FAIL_ON="download", FAIL_WITH=message)
    assert result.returncode == 1
    assert "another file of this name; do not use it" in result.stderr
    assert "detectron2" not in checkout.installed


def test_a_failed_build_is_replaced_by_the_copy(checkout: Checkout) -> None:
    result = checkout.run(
        FAIL_ON="git+https", FAIL_WITH="fatal: Could not resolve host: github.com"
    )
    assert result.returncode == 0, result.stderr
    assert "Could not resolve host" in result.stdout
    assert f"{COPY_LINE} (the official commit could not be installed)" in result.stdout
    assert checkout.run().returncode == 0
    assert checkout.calls == [], "the build is not tried again"


def test_a_build_that_cannot_be_imported_is_replaced_by_the_copy(checkout: Checkout) -> None:
    python = checkout.fake_python.read_text()
    broken = f'case "$*" in *detectron2._C*) [ -e "{checkout.root}/installed" ] || exit 1;; esac'
    checkout.fake_python.write_text(python.replace("exit 0\n", f"{broken}\nexit 0\n"))
    result = checkout.run()
    assert result.returncode == 0, result.stderr
    assert COPY_LINE in result.stdout
    assert checkout.installed == [*ALL, "detectron2"]


def test_one_error_if_nothing_can_be_had(checkout: Checkout) -> None:
    result = checkout.run(
        FAIL_ON="[dg][oi][wt][n+][lh]", FAIL_WITH="No matching distribution found"
    )
    assert result.returncode == 1
    assert result.stderr.count("[setup]") == 1
    for part in (
        f"Detectron2 could not be installed. {INDEX_WHEEL} was tried",
        "the official commit could not be installed",
        "No matching distribution",
        "the package index has no build",
        "make <target> DETECTRON2=<source>",
    ):
        assert part in result.stderr
    assert checkout.run().returncode == 0
    assert checkout.installed == ["detectron2"]


@pytest.mark.parametrize("choice", ["github", "https://example.org/d2"])
def test_a_choice_that_fails_is_an_error(checkout: Checkout, choice: str) -> None:
    result = checkout.run(DETECTRON2=choice, FAIL_ON="git+https", FAIL_WITH="unable to access")
    assert result.returncode == 1
    assert "check the network" in result.stderr
    assert "DETECTRON2=pypi needs no compiler" in result.stderr
    assert not any("pip download" in call for call in checkout.calls)


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


def test_a_wrong_source_leaves_the_working_detectron2_alone(checkout: Checkout) -> None:
    checkout.run()
    result = checkout.run(DETECTRON2="/nowhere")
    assert result.returncode == 1
    assert "neither a clone" in result.stderr
    assert checkout.run().returncode == 0
    assert checkout.calls == []


@pytest.mark.parametrize(
    ("variables", "installed"),
    [
        ({}, ["tools", "torch", "package"]),
        ({"DETECTRON2": "https://example.org/d2"}, ALL),
        ({"FAIL_ON": "-c*import*_C"}, [*ALL, "detectron2"]),
    ],
    ids=["works", "another is asked for", "does not work"],
)
def test_a_ready_made_environment_keeps_a_detectron2_that_works(
    checkout: Checkout, variables: dict[str, str], installed: list[str]
) -> None:
    python = checkout.root / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    shutil.copy(checkout.fake_python, python)
    result = checkout.run(**variables)
    assert result.returncode == ("FAIL_ON" in variables)
    assert checkout.installed == installed


# --- the environment itself -----------------------------------------------------------------------


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


def test_old_pythons_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(setup_env, "OLDEST_PYTHON", (99, 0))
    with pytest.raises(SetupError, match="too old; choose another: make PYTHON="):
        setup_env.set_up(dev=False)


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
        ("github", OFFICIAL),
        ("https://example.org/d2.git", f"git+https://example.org/d2.git@{COMMIT}"),
        ("git+https://example.org/d2", f"git+https://example.org/d2@{COMMIT}"),
        ("https://example.org/d2.git@main", "git+https://example.org/d2.git@main"),
        ("https://example.org/d2.git@fix/one", "git+https://example.org/d2.git@fix/one"),
        ("ssh://git@example.org/d2", f"git+ssh://git@example.org/d2@{COMMIT}"),
        ("file:///srv/d2", f"git+file:///srv/d2@{COMMIT}"),
    ],
)
def test_urls_are_pinned_unless_they_name_a_commit(source: str, requirement: str) -> None:
    assert build_requirement(source) == requirement


def test_paths_are_made_absolute(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clone").mkdir()
    (tmp_path / "d2.whl").write_text("")
    with pytest.raises(SetupError, match="neither a clone"):
        build_requirement("clone")
    (tmp_path / "clone/setup.py").write_text("")
    assert build_requirement("clone") == str(tmp_path / "clone")
    assert build_requirement("d2.whl") == str(tmp_path / "d2.whl")
    with pytest.raises(SetupError, match="neither a clone"):
        build_requirement("absent.whl")
