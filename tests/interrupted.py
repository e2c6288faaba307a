"""A run of ``moepass upcycle`` that is stopped in the middle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from moepass.upcycle.checkpoint import writer


@contextmanager
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, the writer is stopped, as by ctrl-C, when it has written two files."""
    real, written = writer._write_shard, []

    def stop_at_the_third(run: Any, shard: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        real(run, shard)
        written.append(shard.name)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "_write_shard", stop_at_the_third)
        yield
