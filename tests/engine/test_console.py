"""What training prints on the console and what goes to the log only."""

import logging
import os
import sys
import warnings

import pytest
import torch
from tqdm import tqdm

from locreweight.engine.console import (
    CONSOLE,
    describe_environment,
    is_for_console,
    log_setup,
    prints_to_log,
    setup_logging,
)
from tests.engine.tiny_training import restored_loggers_and_signals
from tests.modeling.tiny_model import tiny_config


@pytest.fixture
def printed_and_logged(tmp_path, capsys):
    """Runs a function with the loggers set up; returns what it printed, and the log."""

    def run(function, **how):
        with restored_loggers_and_signals():
            setup_logging(str(tmp_path), **how)
            function()
        return capsys.readouterr().out, (tmp_path / "log.txt").read_text()

    return run


def write_records():
    CONSOLE.info("iter 600: AP %.1f", 39.0)
    logging.getLogger("locreweight.engine.hooks").warning("no pseudo-labels")
    logging.getLogger("locreweight.engine.panels").error("cannot write")
    logging.getLogger("locreweight.engine.panels").info("precision")
    logging.getLogger("detectron2.data.build").info("Distribution of instances")
    logging.getLogger("detectron2.evaluation").warning("No predictions")
    logging.getLogger("fvcore.common.checkpoint").debug("loading")


def test_console_shows_messages_warnings_and_errors(printed_and_logged):
    printed, log = printed_and_logged(write_records)
    assert printed.splitlines() == [
        "iter 600: AP 39.0",
        "warning: no pseudo-labels",
        "error: cannot write",
        "warning: No predictions",
    ]
    for part in ("iter 600", "no pseudo-labels", "precision", "Distribution", "loading"):
        assert log.count(part) == 1


def test_verbose_console_shows_the_whole_log(printed_and_logged):
    printed, log = printed_and_logged(write_records, verbose=True)
    assert printed == log and len(log.splitlines()) == 7


def test_only_the_main_process_prints(printed_and_logged, tmp_path, monkeypatch):
    monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda: 1)
    (tmp_path / "log.txt").touch()
    assert printed_and_logged(write_records) == ("", "")
    assert "no pseudo-labels" in (tmp_path / "log.txt.rank1").read_text()


def test_setting_up_again_does_not_print_twice(printed_and_logged, tmp_path):
    def run():
        setup_logging(str(tmp_path / "evaluation"))
        CONSOLE.info("once")

    assert printed_and_logged(run)[0] == "once\n"


def test_exception_of_the_training_loop_is_left_to_the_caller(printed_and_logged):
    def run():
        try:
            raise RuntimeError("broken")
        except RuntimeError:
            logging.getLogger("detectron2.engine.train_loop").exception("Exception during training")

    printed, log = printed_and_logged(run)
    assert printed == "" and "RuntimeError: broken" in log


def test_console_has_no_warnings_of_frameworks(printed_and_logged):
    def run():
        warnings.warn("mine", UserWarning, stacklevel=1)
        warnings.warn_explicit("internal", UserWarning, f"{torch.__path__[0]}/nn/module.py", 3)

    printed, log = printed_and_logged(run)
    assert "UserWarning: mine" in printed and "internal" not in printed
    assert "UserWarning: mine" in log and "UserWarning: internal" in log


def test_pytorch_prints_errors_about_itself_only(printed_and_logged):
    def run():
        logging.getLogger("torch.utils.cpp_extension").warning("No CUDA runtime is found")

    printed, log = printed_and_logged(run)
    assert printed == "" and "No CUDA runtime" in log


@pytest.mark.parametrize(
    ("name", "level", "expected"),
    [
        ("locreweight.console", logging.INFO, True),
        ("locreweight.engine", logging.INFO, False),
        ("locreweight.engine", logging.WARNING, True),
        ("detectron2.checkpoint", logging.WARNING, True),
        ("detectron2.engine.train_loop", logging.ERROR, False),
    ],
)
def test_is_for_console(name, level, expected):
    record = logging.LogRecord(name, level, "file", 1, "text", (), None)
    assert is_for_console(record) == expected


def test_prints_go_to_the_log(printed_and_logged):
    def run():
        with prints_to_log():
            print("Average", "Precision", end="")
            print(" = 0.403\n\n")
            CONSOLE.info("still shown")
        print("after")

    printed, log = printed_and_logged(run)
    assert printed == "still shown\nafter\n"
    lines = [line.partition("INFO: ")[2] for line in log.splitlines()]
    assert lines == ["Average Precision = 0.403", "still shown"]


def test_messages_do_not_break_the_progress_bar(printed_and_logged, capsys):
    def run():
        with tqdm(total=2, file=sys.stdout, ncols=40, mininterval=0) as bar:
            bar.update()
            CONSOLE.info("message")
            bar.update()

    printed, _ = printed_and_logged(run)
    assert "\rmessage\n" in printed or "\nmessage\n" in printed or printed.startswith("message")
    assert printed.rstrip().endswith("]") and "2/2" in printed


def test_setup_is_logged_without_escape_codes_and_addresses(printed_and_logged, tmp_path):
    cfg = tiny_config({"OUTPUT_DIR": str(tmp_path)})
    printed, log = printed_and_logged(lambda: log_setup(cfg, "arguments"))
    assert printed == "" and "\033" not in log and "object at 0x" not in log
    assert cfg.dump() in log and (tmp_path / "config.yaml").read_text() == cfg.dump()


def test_environment_is_described_without_a_compiler(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "PyTorch" in describe_environment()
    assert capfd.readouterr().err == ""
    assert "CXX" not in os.environ
