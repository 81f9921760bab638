"""Tolerance for unlabeled images that cannot be read.

The loader replaces such an image with another one (:mod:`.loader`). This module decides when there
are too many of them.
"""

from __future__ import annotations

import logging

from ..errors import UsageError

logger = logging.getLogger(__name__)

MIN_DRAWN = 100  # below this number of drawn images, the share of unreadable ones means little
_MAX_NAMED = 1000  # log at most this many files by name


class UnreadableImageCounter:
    """Count unreadable unlabeled images, log each file once, and raise if there are too many.

    Counts start at zero when the process starts. A single file never stops training, and neither
    does any share of the first :data:`MIN_DRAWN` images, unless ``max_share`` is 0.
    """

    def __init__(self, max_share: float) -> None:
        """
        Args:
            max_share: largest tolerated share of unreadable images among the images drawn. 0 makes
                the first unreadable image an error.

        Raises:
            UsageError: if the share is not in [0, 1].
        """
        if not 0 <= max_share <= 1:
            raise UsageError(
                f"DATASETS.CHECKS.MAX_UNREADABLE_SHARE must be in [0, 1], got {max_share}"
            )
        self._max_share = max_share
        self._errors: set[str] = set()
        self._drawn = 0
        self._unreadable = 0

    @property
    def files(self) -> int:
        """Number of distinct unreadable files so far."""
        return len(self._errors)

    def update(self, read_errors: list[list[str]], read: int) -> None:
        """Count the images of one iteration.

        All processes pass the same arguments, so they all make the same decision.

        Args:
            read_errors: for each process, one error message per failed read. The message names the
                file.
            read: number of unlabeled images that each process read successfully.

        Raises:
            UsageError: if the share of unreadable images is too large.
        """
        errors = [error for process_errors in read_errors for error in process_errors]
        for error in errors:
            if error not in self._errors and self.files < _MAX_NAMED:
                logger.warning("skipped an unlabeled image: %s", error)
            self._errors.add(error)
            if self.files == _MAX_NAMED:
                logger.warning("further unreadable images are counted but not named")
        self._unreadable += len(errors)
        self._drawn += len(errors) + read * len(read_errors)
        if is_unreadable_share_tolerated(
            self.files, self._unreadable, self._drawn, self._max_share
        ):
            return
        raise UsageError(
            f"{self._unreadable} of {self._drawn} unlabeled images drawn could not be read, which "
            f"exceeds DATASETS.CHECKS.MAX_UNREADABLE_SHARE {self._max_share:g}. For example: "
            f"{min(self._errors)}. Repair or remove these files, or raise the limit. Then continue "
            "with --resume, and with DATASETS.CHECKS.ALLOW_CHANGED True if you removed files"
        )


def is_unreadable_share_tolerated(
    files: int, unreadable: float, drawn: float, max_share: float
) -> bool:
    """Return whether training continues despite unreadable unlabeled images.

    Args:
        files: number of distinct unreadable files.
        unreadable: number of times that an unreadable file was drawn.
        drawn: number of images drawn, including unreadable ones.
        max_share: ``DATASETS.CHECKS.MAX_UNREADABLE_SHARE``.
    """
    too_few = drawn < MIN_DRAWN or files < 2
    return unreadable <= max_share * drawn or (max_share > 0 and too_few)
