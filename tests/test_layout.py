"""Imports point one way, `engine -> modeling, data -> method`, and files stay short."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "projects/LocReweightTeacher/locreweight"
SOURCES = sorted(PACKAGE.rglob("*.py"))
# Of a subpackage: what of this package it may import, itself aside.
MAY_IMPORT = {
    "method": set(),
    "modeling": {"method", "errors", "installed_detectron2"},
    "data": {"method", "errors"},
    "analysis": {"errors"},
    "zoo": {"errors"},
    "engine": {
        "method",
        "modeling",
        "data",
        "analysis",
        "zoo",
        "errors",
        "config",
        "world_size",
        "installed_detectron2",
    },
    "export": {"modeling", "errors"},
}
METHOD_NEEDS = {"torch", "math", "__future__"}


def modules(text, package):
    """The absolute names of all modules that a source imports, wherever it does."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = [*above, *(node.module.split(".") if node.module else [])]
            yield ".".join(base)
            yield from (".".join([*base, alias.name]) for alias in node.names)


def imports(file):
    package = ["locreweight", *file.relative_to(PACKAGE).parts[:-1]]
    return set(modules(file.read_text(), package))


def files_of(part):
    return sorted((PACKAGE / part).rglob("*.py"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import a.b", {"a.b"}),
        ("from a import b", {"a", "a.b"}),
        ("from . import b", {"locreweight.data", "locreweight.data.b"}),
        ("from ..engine import b", {"locreweight.engine", "locreweight.engine.b"}),
        ("def f():\n    from .c import d", {"locreweight.data.c", "locreweight.data.c.d"}),
    ],
)
def test_imports_are_found(text, expected):
    assert set(modules(text, ["locreweight", "data"])) == expected


@pytest.mark.parametrize(
    ("part", "file"),
    [(part, file) for part in MAY_IMPORT for file in files_of(part)],
    ids=lambda value: value.name if isinstance(value, Path) else value,
)
def test_imports_point_one_way(part, file):
    ours = {name.split(".")[1] for name in imports(file) if name.startswith("locreweight.")}
    assert ours <= MAY_IMPORT[part] | {part}


@pytest.mark.parametrize("file", files_of("method"), ids=lambda file: file.name)
def test_the_method_needs_torch_alone(file):
    theirs = {name.split(".")[0] for name in imports(file)} - {"locreweight"}
    assert theirs <= METHOD_NEEDS | sys.stdlib_module_names


def test_importing_the_package_needs_the_standard_library_alone():
    script = (
        "import sys; before = set(sys.modules); import locreweight\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(result.stdout.split())
    assert "locreweight" in loaded
    assert loaded - {"locreweight"} <= sys.stdlib_module_names


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_files_stay_short(file):
    assert len(file.read_text().splitlines()) < 300
