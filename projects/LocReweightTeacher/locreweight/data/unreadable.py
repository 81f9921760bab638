"""Unlabeled images that cannot be read: how many are tolerated."""

from __future__ import annotations

import logging

from ..errors import UsageError

logger = logging.getLogger(__name__)

MIN_DRAWN = 100  # images drawn before a share of them says anything
_NAMED = 1000  # so many files are named one by one


class UnreadableImages:
    """Counts them from the start of this process on, names each once, and says when to stop.

    One file alone never ends a run, nor does any share of the first images.
    """

    def __init__(self, max_share: float) -> None:
        """
        Args:
            max_share: greatest tolerated share of the images drawn; with 0 the first one is an
                error.

        Raises:
            UsageError: for a share outside of [0, 1].
        """
        if not 0 <= max_share <= 1:
            raise UsageError(f"DATASETS.MAX_UNREADABLE_SHARE must lie in [0, 1], got {max_share}")
        self._max_share = max_share
        self._messages: set[str] = set()
        self._drawn = 0
        self._unread = 0

    @property
    def files(self) -> int:
        """Number of different files so far."""
        return len(self._messages)

    def update(self, unread: list[list[str]], read: int) -> None:
        """Take note of one iteration. All processes are told the same, and decide alike.

        Args:
            unread: of each process, why images could not be read: a message for each time, which
                names the file.
            read: number of unlabeled images that each process read.

        Raises:
            UsageError: if too many are unreadable.
        """
        messages = [message for of_process in unread for message in of_process]
        for message in messages:
            if message not in self._messages and self.files < _NAMED:
                logger.warning("skipped an unlabeled image: %s", message)
            self._messages.add(message)
            if self.files == _NAMED:
                logger.warning("further unreadable images are counted, but not named")
        self._unread += len(messages)
        self._drawn += len(messages) + read * len(unread)
        if tolerated(self.files, self._unread, self._drawn, self._max_share):
            return
        raise UsageError(
            f"{self._unread} of {self._drawn} unlabeled images drawn could not be read, which is "
            f"more than DATASETS.MAX_UNREADABLE_SHARE {self._max_share:g}. One is: "
            f"{min(self._messages)}, or raise that share; then go on with --resume, and with "
            "DATASETS.ALLOW_CHANGED True if files were removed"
        )


def tolerated(files: int, unread: float, drawn: float, max_share: float) -> bool:
    """Whether training goes on although unlabeled images could not be read.

    Args:
        files: how many different ones.
        unread: how often one of them was drawn.
        drawn: how many images were drawn.
        max_share: ``DATASETS.MAX_UNREADABLE_SHARE``.
    """
    too_few = drawn < MIN_DRAWN or files < 2
    return unread <= max_share * drawn or (max_share > 0 and too_few)
