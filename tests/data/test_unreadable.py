"""How many unreadable unlabeled images a run tolerates."""

import logging

import pytest

from locreweight.data.unreadable import MIN_DRAWN, UnreadableImageCounter
from locreweight.errors import UsageError

ONE, TWO = "cannot read a.png: it is empty", "cannot read b.png: it is empty"


def after(max_share, *iterations):
    """Iterations are (messages of one process, number of images that it read)."""
    images = UnreadableImageCounter(max_share)
    for messages, read in iterations:
        images.update([messages], read)
    return images


def test_one_file_never_ends_a_run():
    assert after(0.1, *[([ONE] * 3, 1)] * MIN_DRAWN).files == 1


def test_nor_do_the_first_images():
    assert after(0.1, ([ONE, TWO], 1), ([ONE], 0)).files == 2


@pytest.mark.parametrize(("share", "bad"), [(0.1, 10), (0.25, 25), (0.5, 50)])
def test_a_share_is_tolerated_and_not_more(share, bad):
    skipped = [ONE, TWO] * (bad // 2) + [ONE] * (bad % 2)
    images = after(share, (skipped, 100 - bad))
    assert images.files == 2
    with pytest.raises(UsageError, match=f"{bad + 1} of 101 .*SHARE {share}") as caught:
        images.update([[TWO]], 0)
    assert "a.png" in str(caught.value)


def test_it_is_that_of_all_images_drawn():
    images = after(0.1, ([], 10_000), *[([ONE, TWO], 0)] * 500)
    assert images.files == 2


def test_all_processes_count():
    images = UnreadableImageCounter(0.1)
    images.update([[ONE], [TWO], [], []], read=4)
    assert images.files == 2
    images.update([[]] * 4, read=40)
    with pytest.raises(UsageError, match="52 of 228 "):
        images.update([[ONE] * 25, [TWO] * 25, [], []], read=0)


def test_a_share_of_nothing_ends_with_the_first():
    after(0.0, ([], 5))
    with pytest.raises(UsageError, match=r"1 of 6 .*a\.png"):
        after(0.0, ([ONE], 5))


def test_a_share_of_all_never_ends():
    after(1.0, *[([ONE, TWO], 0)] * MIN_DRAWN)


def test_every_file_is_named_once(caplog):
    with caplog.at_level(logging.WARNING):
        after(1.0, ([ONE, TWO, ONE], 1), ([TWO], 1))
    assert [record.getMessage() for record in caplog.records] == [
        f"skipped an unlabeled image: {message}" for message in (ONE, TWO)
    ]


def test_of_thousands_not_all_are_named(caplog):
    messages = [f"cannot read {i}.png" for i in range(3000)]
    with caplog.at_level(logging.WARNING):
        images = after(1.0, (messages, 0), (messages, 0))
    assert len(caplog.records) == 1001
    assert "not named" in caplog.records[-1].getMessage()
    assert images.files == 3000


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_lies_between_nothing_and_all(share):
    with pytest.raises(UsageError, match=r"MAX_UNREADABLE_SHARE must be in \[0, 1\]"):
        UnreadableImageCounter(share)
