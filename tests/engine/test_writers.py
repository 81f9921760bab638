"""What a resumed run does with the metrics that are there."""

import json

import pytest
from detectron2.utils.events import EventStorage

from locreweight.engine.writers import WINDOW, recent_history, truncate_after


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
        # Lines of one time of writing need not be in order.
        (lines(19, 39, 25), 19, lines(19)),
        # Of a run before this one, in the same folder, nothing is taken.
        (lines(19, 99, 19, 39, 59), 39, lines(19, 99, 19, 39)),
    ],
)
def test_lines_that_will_be_written_again_are_cut(tmp_path, content, iteration, kept):
    file = tmp_path / "metrics.json"
    file.write_text(content)
    truncate_after(file, iteration)
    assert file.read_text() == kept


def test_there_may_be_no_file(tmp_path):
    truncate_after(tmp_path / "none.json", 3)
    assert not (tmp_path / "none.json").exists()


def test_what_is_kept_of_the_past_is_all_that_smoothing_needs():
    with EventStorage() as whole, EventStorage() as resumed:
        for i in range(3 * WINDOW):
            whole.iter = i
            whole.put_scalar("every", i * i % 7)
            whole.put_scalar("rate", i, smoothing_hint=False)
            if i < 5:
                whole.put_scalar("time", i)
            if i % 9 == 0:
                whole.put_scalar("seldom", i)
        history = recent_history(whole)
        assert set(history) == {"every", "rate", "seldom"}  # times are those of a process
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
