"""The Dockerfile has no findings of the linter, and copies only files that exist."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "Dockerfile"


def test_linter_finds_nothing():
    linter = Path(sys.executable).with_name("hadolint")
    result = subprocess.run([linter, DOCKERFILE], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "")


def test_copied_files_exist():
    lines = re.findall(r"^COPY (.*) \S+$", DOCKERFILE.read_text(), re.MULTILINE)
    files = [name for line in lines for name in line.split()]
    assert "setup.cfg" in files
    for name in files:
        assert (ROOT / name).exists(), name


def test_installation_sees_all_that_it_reads():
    """The package's metadata name files that must be copied before the installation."""
    before = DOCKERFILE.read_text().split("RUN ")[0]
    settings = (ROOT / "setup.cfg").read_text()
    for name in re.findall(r"^license_files = (.*)$", settings, re.MULTILINE):
        assert name in before
