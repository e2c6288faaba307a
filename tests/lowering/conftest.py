"""What several tests of planning share."""

from __future__ import annotations

import pytest

from moepass.lowering import links


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """An empty cache folder; no links are remembered from before, or after."""
    monkeypatch.setenv("MOEPASS_CACHE_DIR", str(tmp_path))
    links.forget()
    yield tmp_path
    links.forget()
