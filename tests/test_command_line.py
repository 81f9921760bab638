"""Command lines: flags and KEY VALUE pairs in any order, and no abbreviated flags."""

import argparse
import os

import pytest

import check_data
from locreweight.command_line import ConfigArgumentParser, check_outputs, count_of, reports_errors
from locreweight.engine import argument_parser
from locreweight.errors import UsageError


@pytest.fixture
def parser():
    parser = ConfigArgumentParser(prog="tool")
    parser.add_argument("--config-file", default="")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[])
    return parser


PAIRS = ["OUTPUT_DIR", "x", "SOLVER.BASE_LR", "0.1"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--resume", "--config-file", "c", *PAIRS],
        [*PAIRS, "--resume", "--config-file", "c"],
        ["--config-file", "c", *PAIRS, "--resume"],
        [*PAIRS[:2], "--config-file=c", *PAIRS[2:], "--resume"],
        ["--resume", *PAIRS[:2], "--config-file", "c", *PAIRS[2:]],
    ],
)
def test_flags_before_between_and_after_pairs(parser, arguments):
    args = parser.parse_args(arguments)
    assert (args.resume, args.config_file, args.opts) == (True, "c", PAIRS)


def test_without_pairs(parser):
    assert parser.parse_args([]).opts == []


@pytest.mark.parametrize("value", ["-1", "-0.5", "-1e-3", "-x", "--resum", "", "a b", "()"])
def test_values_of_pairs_can_be_anything(parser, value):
    args = parser.parse_args(["SEED", value, "--resume"])
    assert args.opts == ["SEED", value] and args.resume


def test_flags_with_several_values(parser):
    args = parser.parse_args(["SEED", "5", "--seeds", "1", "2", "--resume"])
    assert (args.seeds, args.opts) == ([1, 2], ["SEED", "5"])


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (["--conf", "c"], "--conf"),
        (["--res"], "--res"),
        ([*PAIRS, "--resum"], "--resum"),
        (["--resum", *PAIRS], "--resum"),
        (["-x"], "-x"),
        (["--config-fil=c"], "--config-fil=c"),
    ],
)
def test_unknown_and_abbreviated_flags_are_errors(parser, capsys, arguments, flag):
    with pytest.raises(SystemExit) as exit_:
        parser.parse_args(arguments)
    assert exit_.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: unrecognized arguments: {flag}\n")


def test_help_explains_the_pairs(parser):
    assert "KEY VALUE ..." in parser.format_help()


def test_training_has_detectron2s_flags_and_ours():
    arguments = ["OUTPUT_DIR", "x", "--resume", "--num-gpus", "2", "--method", "stac"]
    args = argument_parser().parse_args(["--config-file", "c", *arguments])
    assert (args.config_file, args.resume, args.num_gpus) == ("c", True, 2)
    assert (args.method, args.overwrite, args.eval_only) == ("stac", False, False)
    assert args.opts == ["OUTPUT_DIR", "x"]
    assert args.num_machines == 1 and args.machine_rank == 0 and args.dist_url.startswith("tcp:")


def test_tools_take_flags_after_pairs():
    args = check_data.parse_arguments(["SEED", "3", "--num-gpus", "2"])
    assert (args.num_gpus, args.opts) == (2, ["SEED", "3"])


def test_namespace_can_be_given(parser):
    namespace = argparse.Namespace(extra=1)
    assert parser.parse_args(["--resume"], namespace) is namespace
    assert namespace.resume and namespace.extra == 1


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UsageError("wrong"), "error: wrong"),
        (
            NotADirectoryError(20, "Not a directory", "a/b.html"),
            "error: cannot read or write a/b.html: Not a directory",
        ),
        (OSError(28, "No space left on device"), "error: No space left on device"),
        (ConnectionResetError("by peer"), "error: by peer"),
        (TimeoutError(), "error: TimeoutError"),
    ],
)
def test_errors_end_a_tool_with_one_line(error, message):
    @reports_errors
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == message


@pytest.mark.parametrize(("count", "expected"), [(0, "0 images"), (1, "1 image"), (2, "2 images")])
def test_count_of(count, expected):
    assert count_of(count, "image") == expected


def test_outputs_that_can_be_written(tmp_path):
    (tmp_path / "file").touch()
    check_outputs(tmp_path / "new/a.json", tmp_path / "file", None)
    check_outputs(tmp_path / "new/folder", tmp_path, are_folders=True)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("name", "are_folders", "named", "error"),
    [
        ("folder", False, "folder", IsADirectoryError),
        ("file", True, "file", NotADirectoryError),
        ("file/sub/a.json", False, "file", NotADirectoryError),
        ("file/sub", True, "file", NotADirectoryError),
        ("folder/locked/sub/a.json", False, "folder/locked", PermissionError),
        ("folder/locked", True, "folder/locked", PermissionError),
    ],
)
def test_outputs_that_cannot_be_written(tmp_path, monkeypatch, name, are_folders, named, error):
    (tmp_path / "folder/locked").mkdir(parents=True)
    (tmp_path / "file").touch()
    # For root no folder is locked.
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "locked")
    with pytest.raises(error) as raised:
        check_outputs(tmp_path / name, are_folders=are_folders)
    assert raised.value.filename == str(tmp_path / named)
