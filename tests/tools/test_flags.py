"""Tools take flags after KEY VALUE pairs, and no abbreviated flags."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(
    file
    for folder in ("benchmarks", "datasets", "examples", "tools")
    for file in (ROOT / folder).glob("*.py")
    if "ArgumentParser(" in file.read_text()
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.name)
def test_no_script_guesses_abbreviations(script):
    text = script.read_text()
    parsers = re.findall(r"(\w*)ArgumentParser\((\s*allow_abbrev=False)?", text)
    assert all(kind == "Config" or strict for kind, strict in parsers)
    assert "REMAINDER" not in text
