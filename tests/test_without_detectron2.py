"""Without Detectron2 its tests are left out and counted, or fail the run where it is required."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
QUICK_TORCH = {"torch": "def manual_seed(seed): pass\n"}
ABSENT = "raise ModuleNotFoundError(f'No module named {__name__!r}', name=__name__)\n"

METHOD_TEST = "def test_one():\n    assert True\n"
MODELING_TESTS = """
import detectron2

def test_one():
    assert detectron2

class TestMore:
    def test_two(self):
        assert detectron2
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """A small suite under the real conftest.py: two tests that run without, four that do not."""
    files = {
        "tests/test_layout.py": METHOD_TEST,
        "tests/method/test_small.py": METHOD_TEST,
        "tests/test_top.py": MODELING_TESTS,
        "tests/modeling/test_big.py": MODELING_TESTS,
        "setup.cfg": "[tool:pytest]\naddopts = --import-mode=importlib\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    shutil.copy(ROOT / "tests/conftest.py", tmp_path / "tests")
    return tmp_path


def run_pytest(
    folder: Path, stubs: Path, *arguments: str, modules: dict[str, str], required: str = ""
) -> subprocess.CompletedProcess[str]:
    """pytest in a process of its own, in which `modules` stand for those that are installed."""
    for name, text in modules.items():
        (stubs / name).mkdir(parents=True, exist_ok=True)
        (stubs / name / "__init__.py").write_text(text)
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(stubs), "REQUIRE_DETECTRON2": required},
        capture_output=True,
        text=True,
    )


def test_nothing_is_left_out_with_detectron2(suite: Path) -> None:
    result = run_pytest(
        suite, suite / "stubs", modules={**QUICK_TORCH, "detectron2": ""}, required="1"
    )
    assert result.returncode == 0, result.stdout
    assert "6 passed" in result.stdout
    assert "Left out" not in result.stdout


@pytest.mark.parametrize("required", ["", "0"])
def test_left_out_and_counted_without(suite: Path, required: str) -> None:
    result = run_pytest(
        suite, suite / "stubs", modules={**QUICK_TORCH, "detectron2": ABSENT}, required=required
    )
    assert result.returncode == 0, result.stdout
    assert "2 passed" in result.stdout
    assert "Left out 4 tests that need Detectron2: modeling 2, test_top.py 2." in result.stdout
    assert "No module named 'detectron2'" in result.stdout
    assert "make setup" in result.stdout


def test_a_folder_named_on_the_command_line_is_left_out_too(suite: Path) -> None:
    result = run_pytest(
        suite, suite / "stubs", "tests/modeling", modules={**QUICK_TORCH, "detectron2": ABSENT}
    )
    assert result.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, result.stdout
    assert re.search(r"Left out .* modeling/test_big.py 2", result.stdout)


@pytest.mark.parametrize("arguments", [(), ("-k", "small"), ("tests/method",)])
def test_absence_fails_where_it_is_required(suite: Path, arguments: tuple[str, ...]) -> None:
    result = run_pytest(
        suite,
        suite / "stubs",
        *arguments,
        modules={**QUICK_TORCH, "detectron2": ABSENT},
        required="1",
    )
    assert result.returncode == 1, result.stdout
    assert "Detectron2 is required but cannot be imported" in result.stdout
    assert re.search(r"1 failed, \d passed", result.stdout.splitlines()[-1])


def test_seeds_are_fixed(suite: Path) -> None:
    (suite / "tests/method/test_small.py").write_text(
        "import random, numpy, torch, pytest\n"
        "seen = set()\n"
        "@pytest.mark.parametrize('time', range(3))\n"
        "def test_same_every_time(time):\n"
        "    seen.add((random.random(), numpy.random.rand(), torch.rand(()).item()))\n"
        "    assert len(seen) == 1\n"
    )
    result = run_pytest(suite, suite / "stubs", "tests/method", modules={"detectron2": ""})
    assert "3 passed" in result.stdout, result.stdout


@pytest.mark.parametrize(
    ("folder", "missing", "expected"),
    [
        ("tests", ["detectron2"], {"examples", "method"}),
        (
            "tests/method",
            ["detectron2", "fvcore", "iopath", "pycocotools", "cv2", "PIL"],
            {"method"},
        ),
    ],
    ids=["all that is kept runs without Detectron2", "the method runs on torch alone"],
)
def test_the_real_suite_can_be_collected(
    tmp_path: Path, folder: str, missing: list[str], expected: set[str]
) -> None:
    result = run_pytest(
        ROOT, tmp_path, "--collect-only", folder, modules=dict.fromkeys(missing, ABSENT)
    )
    assert result.returncode == 0, result.stdout
    folders = set(re.findall(r"^tests/(\w+)/", result.stdout, re.MULTILINE))
    assert folders == expected
