"""Fixtures shared with the tests of the engine."""

from tests.engine.conftest import datasets, make_trainer  # noqa: F401
