"""The long run of ``benchmarks/long_run.py``, short: the same code, 40 steps instead of 2,000."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
STEPS = 40


@pytest.fixture(scope="module")
def long_run() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        return importlib.import_module("benchmarks.long_run")


def test_losses_graphs_memory_and_state_of_a_short_run(long_run):
    for row in long_run.compare(STEPS, "eager"):
        assert row["first 20 steps apart"] < 1e-4
        assert row["loss at the end"] == pytest.approx(row["uncompiled"], abs=1e-2)
        assert row["loss at the end"] < 3.0, "it learns: a uniform guess costs 4.16"
        assert row["compiles"] <= 1 + 2 * 3, "without gradients, then each of at most three ranges"
        assert row["last compile at step"] < STEPS // 2
        assert row["states at the end"] == row["states at a tenth"] == (0 if row["form"] == "converted" else 2)
        assert row["MiB at the end"] < row["MiB at a tenth"] + 64


def test_a_killed_run_is_resumed_to_the_same_bits(long_run, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert long_run.resumed_is_equal(8, "eager", tmp_path)
