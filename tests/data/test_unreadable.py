"""How many unreadable unlabeled images training tolerates."""

import logging

import pytest

from locreweight.data.unreadable import MIN_DRAWN, UnreadableImageCounter
from locreweight.errors import UsageError

ONE, TWO = "cannot read a.png: it is empty", "cannot read b.png: it is empty"


def count(max_share, *iterations):
    """Count iterations of one process, given as (error messages, number of images read)."""
    counter = UnreadableImageCounter(max_share)
    for errors, read in iterations:
        counter.update([errors], read)
    return counter


def test_a_single_file_never_raises():
    assert count(0.1, *[([ONE] * 3, 1)] * MIN_DRAWN).files == 1


def test_the_first_images_never_raise():
    assert count(0.1, ([ONE, TWO], 1), ([ONE], 0)).files == 2


@pytest.mark.parametrize(("share", "unreadable"), [(0.1, 10), (0.25, 25), (0.5, 50)])
def test_raises_above_the_share(share, unreadable):
    errors = [ONE, TWO] * (unreadable // 2) + [ONE] * (unreadable % 2)
    counter = count(share, (errors, 100 - unreadable))
    assert counter.files == 2
    with pytest.raises(UsageError, match=f"{unreadable + 1} of 101 .*SHARE {share}") as caught:
        counter.update([[TWO]], 0)
    assert "a.png" in str(caught.value)


def test_share_is_relative_to_all_images_drawn():
    counter = count(0.1, ([], 10_000), *[([ONE, TWO], 0)] * 500)
    assert counter.files == 2


def test_counts_all_processes():
    counter = UnreadableImageCounter(0.1)
    counter.update([[ONE], [TWO], [], []], read=4)
    assert counter.files == 2
    counter.update([[]] * 4, read=40)
    with pytest.raises(UsageError, match="52 of 228 "):
        counter.update([[ONE] * 25, [TWO] * 25, [], []], read=0)


def test_share_zero_raises_at_the_first():
    count(0.0, ([], 5))
    with pytest.raises(UsageError, match=r"1 of 6 .*a\.png"):
        count(0.0, ([ONE], 5))


def test_share_one_never_raises():
    count(1.0, *[([ONE, TWO], 0)] * MIN_DRAWN)


def test_logs_each_file_once(caplog):
    with caplog.at_level(logging.WARNING):
        count(1.0, ([ONE, TWO, ONE], 1), ([TWO], 1))
    assert [record.getMessage() for record in caplog.records] == [
        f"skipped an unlabeled image: {message}" for message in (ONE, TWO)
    ]


def test_logs_at_most_1000_files(caplog):
    errors = [f"cannot read {i}.png" for i in range(3000)]
    with caplog.at_level(logging.WARNING):
        counter = count(1.0, (errors, 0), (errors, 0))
    assert len(caplog.records) == 1001
    assert "not named" in caplog.records[-1].getMessage()
    assert counter.files == 3000


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_share_must_be_in_0_1(share):
    with pytest.raises(UsageError, match=r"MAX_UNREADABLE_SHARE must be in \[0, 1\]"):
        UnreadableImageCounter(share)
