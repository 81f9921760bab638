import pytest

from locreweight.checkpoint.zoo import VARIABLE
from tests.engine.conftest import datasets, make_trainer  # noqa: F401  (fixtures)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """What is fetched from servers goes into a folder of the test; no zoo is named."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(VARIABLE, raising=False)
    return tmp_path / "cache"
