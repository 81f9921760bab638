"""Fixtures of trainings, shared with tests/engine."""

from tests.engine.conftest import datasets, make_trainer

__all__ = ["datasets", "make_trainer"]
