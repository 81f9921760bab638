"""Imports point one way: engine -> methods -> modeling, data -> losses, ema, geometry."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "projects/LocReweightTeacher/locreweight"
TORCH_ONLY = {"losses", "ema", "geometry"}
# Parts of the package that each part may import, besides itself and `errors`.
MAY_IMPORT = {
    "losses": set(),
    "ema": set(),
    "geometry": set(),
    "installed_detectron2": set(),
    "modeling": TORCH_ONLY | {"installed_detectron2"},
    "data": TORCH_ONLY | {"file_io", "run_files"},
    "methods": TORCH_ONLY | {"modeling", "data"},
    "file_io": set(),
    "run_files": set(),
    "command_line": set(),
    "checkpoint": {"modeling", "file_io", "run_files"},
    "config": {"checkpoint", "modeling"},
    "config_checks": {"config", "modeling", "installed_detectron2"},
    "config_scaling": {"config_checks"},
    "export": TORCH_ONLY | {"modeling", "checkpoint"},
    "visualization.labels": set(),
    "visualization.drawing": {"visualization.labels"},
    "engine": TORCH_ONLY
    | {"modeling", "data", "methods", "checkpoint", "visualization.drawing"}
    | {"config", "config_checks", "config_scaling"}
    | {"installed_detectron2", "file_io", "run_files", "command_line"},
    "visualization": TORCH_ONLY
    | {"modeling", "data", "engine", "checkpoint", "config", "model_zoo", "visualization.drawing"}
    | {"file_io", "run_files"},
    "publish": {"data", "engine", "checkpoint", "config", "export", "visualization", "file_io"}
    | {"run_files"},
}
TORCH_ONLY_NEEDS = {"torch", "math", "__future__"}


def modules(text, package):
    """Yield the absolute names of all modules that a source file imports, at any level."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package[: len(package) - node.level + 1] if node.level else []
            base = [*parent, *(node.module.split(".") if node.module else [])]
            yield ".".join(base)
            yield from (".".join([*base, alias.name]) for alias in node.names)


def imports(file):
    package = ["locreweight", *file.relative_to(PACKAGE).parts[:-1]]
    return set(modules(file.read_text(), package))


def part_of(module):
    """Return the entry of MAY_IMPORT that a module of the package belongs to, if any."""
    parts = module.split(".")
    candidates = (".".join(parts[:n]) for n in (2, 1))
    return next((name for name in candidates if name in MAY_IMPORT), parts[0])


def files_of(part):
    files = sorted(PACKAGE.rglob("*.py"))
    named = {file: ".".join(file.relative_to(PACKAGE).with_suffix("").parts) for file in files}
    return [file for file, module in named.items() if part_of(module) == part]


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
def test_modules_finds_all_imports(text, expected):
    assert set(modules(text, ["locreweight", "data"])) == expected


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_parts_import_only_allowed_parts(part):
    files = files_of(part)
    assert files
    for file in files:
        # `from ..visualization import drawing` gives the package and the module. Keep the module.
        names = {name for name in imports(file) if name.startswith("locreweight.")}
        names = {name.removeprefix("locreweight.") for name in names}
        longest = {n for n in names if not any(other.startswith(f"{n}.") for other in names)}
        imported = {part_of(name) for name in longest}
        assert imported <= MAY_IMPORT[part] | {part, "errors"}, file


@pytest.mark.parametrize("part", sorted(TORCH_ONLY))
def test_torch_only_parts_import_only_torch(part):
    for file in files_of(part):
        packages = {name.split(".")[0] for name in imports(file)} - {"locreweight"}
        assert packages <= TORCH_ONLY_NEEDS | sys.stdlib_module_names, file


def test_importing_the_package_needs_only_the_standard_library():
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


@pytest.mark.parametrize("file", ["trainer.py", "training_step.py"])
def test_trainer_and_step_know_no_method_by_name(file):
    names = re.findall(
        r"@METHOD_REGISTRY.register\(\)\nclass (\w+)",
        "".join(path.read_text() for path in (PACKAGE / "methods").glob("*.py")),
    )
    assert len(names) > 5
    found = set(re.findall(r"\w+", (PACKAGE / "engine" / file).read_text()))
    assert not found & set(names)
