"""The stores of these tests have shards of a few rows."""

import pytest


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffaug.store.shards._LEAST_BYTES", 6000)
