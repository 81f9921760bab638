"""``--help`` of every script explains each option, and shows its default and an example."""

import argparse
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from locreweight.command_line import HelpFormatter
from locreweight.engine import argument_parser

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(
    file
    for folder in ("benchmarks", "datasets", "examples", "tools")
    for file in (ROOT / folder).glob("*.py")
    if "ArgumentParser(" in file.read_text()
)


def parser_and_help(script, monkeypatch, capsys):
    """Call a script with --help; returns its parser and what it prints."""
    spec = importlib.util.spec_from_file_location(f"help_of_{script.stem}", script)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    parsers = []
    original = argparse.ArgumentParser.parse_known_args

    def parse_known_args(self, *args, **kwargs):
        parsers.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as end:
        module.main()
    assert not end.value.code
    return parsers[0], capsys.readouterr().out


def check_options(parser, text):
    for action in parser._actions:
        if action.help == argparse.SUPPRESS or isinstance(action, argparse._HelpAction):
            continue
        assert action.help, f"{action.option_strings or action.dest} has no help"
        if "default: " in action.help.lower():  # it explains what the default means
            continue
        if isinstance(action.default, int | float) and action.default is not False:
            described = " ".join(text.split("\n  " + action.option_strings[0])[-1].split())
            assert re.search(rf"default: {re.escape(str(action.default))}\b", described, re.I)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.name)
def test_help_has_defaults_and_an_example(script, monkeypatch, capsys):
    parser, text = parser_and_help(script, monkeypatch, capsys)
    check_options(parser, text)
    name = re.escape(str(script.relative_to(ROOT)))
    module = f"{script.parent.name}.{script.stem}"
    assert re.search(rf"python ({name}|-m {module})", text) or "make quickstart" in text


def test_help_of_train_net():
    text = argument_parser().format_help()
    check_options(argument_parser(), text)
    assert "--config-file" in text.split("Examples")[1]


def test_help_of_setup_installs_nothing(tmp_path):
    script = ROOT / "tools/setup_env.py"
    command = [sys.executable, script, "--help"]
    result = subprocess.run(command, capture_output=True, text=True, env={"VENV": str(tmp_path)})
    assert "python3 tools/setup_env.py" in result.stdout and not list(tmp_path.iterdir())


def test_formatter_adds_defaults_that_the_help_lacks():
    parser = argparse.ArgumentParser(formatter_class=HelpFormatter)
    parser.add_argument("--zero", type=int, default=0, help="number")
    parser.add_argument("--list", nargs="+", default=["5%", 2], help="values")
    parser.add_argument("--flag", action="store_true", help="switch")
    parser.add_argument("--none", help="nothing")
    parser.add_argument("--said", default=3, help="number. Default: three")
    text = " ".join(parser.format_help().split())
    assert "number. Default: 0" in text and "values. Default: 5% 2" in text
    assert "switch --none NONE nothing --said SAID number. Default: three" in text
