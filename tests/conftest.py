"""What all tests share: fixed seeds, and what happens to them without Detectron2.

What runs without it is named here; all else is left out where it cannot be imported, and the
summary says so. With REQUIRE_DETECTRON2=1 its absence is a failure.
"""

from __future__ import annotations

import ast
import os
import random
from pathlib import Path

# Read when torch is imported. Tensors of tests are tiny: more threads, here or in a process that a
# test starts, only wait for each other, and for whatever else runs on the machine.
os.environ["OMP_NUM_THREADS"] = "1"
# Tests compare to the bit, which a GPU's kernels do not promise; see engine/pretend_device.py.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import pytest
import torch

TESTS = Path(__file__).parent
WITHOUT_DETECTRON2 = {
    "examples",
    "method",
    "test_layout.py",
    "test_make_synthetic.py",
    "test_setup_env.py",
    "test_without_detectron2.py",
}
REQUIRED = os.environ.get("REQUIRE_DETECTRON2", "") not in ("", "0")
LEFT_OUT = pytest.StashKey[list[Path]]()

try:
    import detectron2  # noqa: F401
except ImportError as error:
    WHY_MISSING = f"{type(error).__name__}: {error}"
else:
    WHY_MISSING = ""


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def count_tests(path: Path) -> int:
    """Test functions and methods in a file or folder, found without importing anything."""
    files = path.rglob("test_*.py") if path.is_dir() else [path]
    return sum(
        isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    )


class Detectron2IsInstalled(pytest.Item):
    """Stands for all tests that are left out, where leaving them out is a failure."""

    def runtest(self) -> None:
        pytest.fail(f"Detectron2 is required but cannot be imported: {WHY_MISSING}", pytrace=False)

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, self.name


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LEFT_OUT] = []


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if not WHY_MISSING or TESTS not in collection_path.parents:
        return None
    if collection_path.relative_to(TESTS).parts[0] in WITHOUT_DETECTRON2:
        return None
    config.stash[LEFT_OUT].append(collection_path)
    return True


@pytest.hookimpl(trylast=True)  # after -k and -m, which would deselect it
def pytest_collection_modifyitems(session: pytest.Session, items: list[pytest.Item]) -> None:
    if WHY_MISSING and REQUIRED:
        item = Detectron2IsInstalled.from_parent(session, name="Detectron2 is installed")
        items.insert(0, item)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    counts = {path.relative_to(TESTS): count_tests(path) for path in config.stash[LEFT_OUT]}
    if not any(counts.values()):
        return
    parts = ", ".join(f"{path} {count}" for path, count in counts.items() if count)
    terminalreporter.section("without Detectron2", yellow=True)
    terminalreporter.line(f"Left out {sum(counts.values())} tests that need Detectron2: {parts}.")
    terminalreporter.line(f"It cannot be imported ({WHY_MISSING}).")
    terminalreporter.line(
        "To install it: `make setup`, or `make setup DETECTRON2=<a clone, a wheel or a git URL>`."
    )
