import pytest

from locreweight.checkpoint.zoo import VARIABLE
from tests.engine.conftest import datasets, make_trainer  # noqa: F401  (fixtures)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Cache downloads in a folder of the test, and configure no zoo."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(VARIABLE, raising=False)
    return tmp_path / "cache"
