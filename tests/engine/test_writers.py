"""Metric files and histories of resumed runs, and writers on a full disk."""

import json
import logging
import os

import pytest
from detectron2.utils.events import EventStorage, EventWriter

from locreweight.engine.writers import WINDOW, LenientWriter, recent_history, truncate_after


def lines(*iterations):
    return "".join(json.dumps({"iteration": i, "loss": i / 3}) + "\n" for i in iterations)


@pytest.mark.parametrize(
    ("content", "iteration", "kept"),
    [
        (lines(19, 39, 59), 39, lines(19, 39)),
        (lines(19, 39, 59), 40, lines(19, 39)),
        (lines(19, 39, 59), 59, lines(19, 39, 59)),
        (lines(19, 39, 59), -1, ""),
        (lines(19, 39) + '{"iteration": 5', 39, lines(19, 39)),
        (lines(19, 39) + '{"iteration": 5\n', 39, lines(19, 39)),
        (lines(19, 39) + "5\n", 39, lines(19, 39)),
        (lines(19, 39) + "{}\n", 39, lines(19, 39)),
        ('{"it', 39, ""),
        ("", 39, ""),
        # Lines that were written together need not be in order.
        (lines(19, 39, 25), 19, lines(19)),
        # Nothing is removed from an earlier run in the same file.
        (lines(19, 99, 19, 39, 59), 39, lines(19, 99, 19, 39)),
    ],
)
def test_truncate_after_removes_later_lines(tmp_path, content, iteration, kept):
    file = tmp_path / "metrics.json"
    file.write_text(content)
    truncate_after(file, iteration)
    assert file.read_text() == kept


def test_truncate_after_ignores_a_missing_file(tmp_path):
    truncate_after(tmp_path / "none.json", 3)
    assert not (tmp_path / "none.json").exists()


def test_recent_history_is_enough_for_smoothing():
    with EventStorage() as whole, EventStorage() as resumed:
        for i in range(3 * WINDOW):
            whole.iter = i
            whole.put_scalar("every", i * i % 7)
            whole.put_scalar("rate", i, smoothing_hint=False)
            if i < 5:
                whole.put_scalar("time", i)
            if i % 9 == 0:
                whole.put_scalar("rare", i)
        history = recent_history(whole)
        assert set(history) == {"every", "rate", "rare"}  # times are not resumed
        assert all(len(values) <= WINDOW for _, values in history.values())
        for name, (smoothed, values) in history.items():
            for value, iteration in values:
                resumed.put_scalar(name, value, smoothed, iteration)
        for i in range(3 * WINDOW, 4 * WINDOW):
            for storage in (whole, resumed):
                storage.iter = i
                storage.put_scalar("every", i * i % 5)
            expected = whole.latest_with_smoothing_hint()
            del expected["time"]
            assert resumed.latest_with_smoothing_hint() == expected


def test_lenient_writer_logs_each_failure_once(caplog):
    class Writer(EventWriter):
        def write(self):
            if next(failures):
                raise OSError(28, os.strerror(28))

        def close(self):
            raise OSError(28, os.strerror(28))

    failures = iter([True, True, False, True])
    writer = LenientWriter(Writer())
    counts = []
    with caplog.at_level(logging.ERROR):
        for _ in range(4):
            writer.write()
            counts.append(len(caplog.records))
        writer.close()
    assert counts == [1, 1, 1, 2]
    assert "Writer cannot write its metrics: [Errno 28] No space left on device" in caplog.text
