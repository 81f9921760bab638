"""Metrics that cannot be written must not end a training."""

from __future__ import annotations

import logging

from detectron2.utils.events import EventWriter

logger = logging.getLogger(__name__)


class LenientWriter(EventWriter):
    """Another writer, whose failure to write is said, once until it succeeds again.

    Some of what it could not write on a full disk is lost; checkpoints do not depend on it.
    """

    def __init__(self, writer: EventWriter) -> None:
        self._writer = writer
        self._fails = False

    def write(self) -> None:
        try:
            self._writer.write()
        except OSError as error:
            self._say(error)
        else:
            self._fails = False

    def close(self) -> None:
        try:
            self._writer.close()
        except OSError as error:
            self._say(error)

    def _say(self, error: OSError) -> None:
        if not self._fails:
            name = type(self._writer).__name__
            logger.error("%s cannot write its metrics: %s. Training goes on", name, error)
        self._fails = True
