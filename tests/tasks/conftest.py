"""The data tests have a cache of their own: nobody's home is touched."""

import pytest


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    """Every test has an empty cache."""
    monkeypatch.setenv("METAGEN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"
