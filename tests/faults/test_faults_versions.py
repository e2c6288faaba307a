"""A torch without one of the private APIs: what depends on it is named and off, or refused; never guessed."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from tiny import D, Net, compiled, fresh, statuses  # noqa: F401 -- fresh is a fixture
from torch.nn.parallel import DistributedDataParallel

import moepass
from moepass import _compat, errors
from moepass._compat.lost import lost


@pytest.fixture(autouse=True)
def _said_nothing_yet():
    lost.cache_clear()


def without(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """Importing ``module`` fails."""
    monkeypatch.setitem(sys.modules, module, None)


def test_without_the_trace_artifacts_are_left_out_which_is_said_once(monkeypatch, caplog):
    report = moepass.explain(Net(1))(torch.randn(8, D))
    without(monkeypatch, "torch._logging._internal")
    for _ in range(2):
        _compat.trace_artifact("moepass_plan", "json", report.to_json)
    assert caplog.text.count("write TORCH_TRACE artifacts: they are left out") == 1


def test_without_graph_passes_the_caches_are_off(monkeypatch, caplog):
    without(monkeypatch, "torch._inductor.custom_graph_pass")
    patches = _compat.plan_key_patches("key", {"max_autotune": False})
    assert patches == {"max_autotune": False, "force_disable_caches": True}
    with torch._inductor.config.patch(patches):
        assert torch.compiler.config.force_disable_caches, "Inductor's and AOTAutograd's"
    assert "keep plans apart in the compile caches" in caplog.text


def test_without_the_sight_of_ddp_every_process_group_is_taken_for_it(monkeypatch, caplog):
    monkeypatch.delattr(DistributedDataParallel, "_get_active_ddp_module")
    assert not _compat.inside_ddp(), "no process group, no DDP"
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert _compat.inside_ddp()
    assert "see whether DDP runs" in caplog.text


def test_without_the_sight_of_fsdp_nothing_is_converted_under_it(monkeypatch, caplog):
    without(monkeypatch, "torch.distributed._composable_state")
    monkeypatch.setitem(sys.modules, "torch.distributed.fsdp._fully_shard", types.ModuleType("fsdp"))
    model, x = Net(1), torch.randn(8, D)
    assert torch.equal(compiled(model, "eager")(x), model(x))
    assert statuses() == [("fallback", "missing_capability")]
    assert "tell FSDP2's gathered weights from a model's own" in caplog.text


def test_without_the_sight_of_a_backward_nothing_is_recorded_twice(monkeypatch):
    monkeypatch.delattr(torch._C, "_current_graph_task_id")
    with pytest.raises(errors.MissingCapability, match="tell a recomputation from a forward"):
        _compat.inside_backward()
