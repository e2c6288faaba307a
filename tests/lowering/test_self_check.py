"""A machine's kernels are checked once: success is remembered, failure keeps them out of plans and says why."""

from __future__ import annotations

import logging

import pytest
import torch

from moepass.lowering import self_check
from moepass.lowering.fused import Fused
from moepass.lowering.hardware import Hardware
from moepass.lowering.plan import TokenRange, Workload
from moepass.lowering.planner import plan

WORK = Workload(tokens=64, D=2048, F=768, E=128, K=8, n=2, dtype="bfloat16", device="cuda")


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """The devices that were checked, on a machine with an accelerator; ``runs.wrong`` is what the check finds."""

    class Runs(list):
        wrong: tuple[str, ...] = ()

    made = Runs()

    def wrong(device):
        made.append(device)
        yield from made.wrong

    monkeypatch.setenv("MOEPASS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(self_check, "_wrong", wrong)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(self_check.machine, "fingerprint", lambda device: f"made-up-{device}")
    self_check._checked.cache_clear()
    yield made
    self_check._checked.cache_clear()


def test_success_is_remembered_for_these_sources_alone(runs, monkeypatch):
    for _ in range(2):
        assert Fused().legal(WORK).legal
        self_check._checked.cache_clear()  # another process
    assert runs == ["cuda"]
    monkeypatch.setattr(self_check, "_sources", lambda: "changed")
    assert Fused().legal(WORK).legal
    assert runs == ["cuda", "cuda"]


def test_failure_keeps_the_kernels_out_of_plans_and_is_looked_at_again(runs, caplog):
    runs.wrong = ("y is off by 3.0e-01",)
    with caplog.at_level(logging.WARNING):
        verdict = Fused().legal(WORK)
    assert (verdict.legal, verdict.code) == (False, "self_check")
    assert "y is off by 3.0e-01" in verdict.detail
    assert "left out of plans" in caplog.text
    chosen = plan(WORK, TokenRange(), Hardware.preset("H200"))
    assert chosen.lowering != "fused"
    assert any("y is off" in (a.detail or "") for a in chosen.alternatives)
    self_check._checked.cache_clear()
    runs.wrong = ()
    assert Fused().legal(WORK).legal


def test_nothing_is_launched_while_a_graph_is_captured(runs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "run the block once" in Fused().legal(WORK).detail
    assert runs == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert Fused().legal(WORK).legal


def test_plans_for_another_machine_check_nothing(runs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Fused().legal(WORK).legal
    assert runs == []
