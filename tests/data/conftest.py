import logging

import pytest


@pytest.fixture(autouse=True)
def _logs_reach_caplog(monkeypatch):
    """Detectron2's logger setup stops them on the way, and other tests may have called it."""
    monkeypatch.setattr(logging.getLogger("locreweight"), "propagate", True)
