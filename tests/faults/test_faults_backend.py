"""A failure inside any stage of the backend leaves a working, un-rewritten model, one log line and a report."""

from __future__ import annotations

import logging

import pytest
import torch
from tiny import D, Net, compiled, fresh, gradients, statuses  # noqa: F401 -- fresh is a fixture

import moepass
from moepass import _compat, attach, backend, decide
from moepass.attach import attached_states
from moepass.explain import trace
from moepass.lowering import measure, planner
from moepass.lowering.base import Lowering
from moepass.lowering.dense import DenseEinsum
from moepass.lowering.grouped import Grouped

#: Where each stage does its work.
STAGES = {
    "capture: copying the graph": (_compat, "copy_dynamo_graph"),
    "capture": (backend.Capture, "of"),
    "recognise": (backend, "recognise"),
    "recognise: our own op": (backend.semantic, "find"),
    "recognise: existing experts": (backend.foreign, "recognise_all"),
    "recognise: dense blocks": (backend, "recognise_all"),
    "plan": (backend, "decide"),
    "plan: one block": (backend, "decide_dense"),
    "plan: completing the spec": (decide, "complete"),
    "plan: choosing": (decide, "select"),
    "plan: hardware": (backend, "hardware_of"),
    "convert: making weights": (attach, "make_weights"),
    "convert: attaching": (backend, "state_for"),
    "lower": (backend, "rewrite"),
    "lower: the region": (backend, "rewrite_dense"),
    "lower: the op": (backend, "lowered_op"),
    "report": (backend, "report_of"),
    "report: publishing": (trace, "emit"),
    "codegen": (backend, "_codegen"),
}


def once(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, error: Exception) -> None:
    """The first call of ``owner.name`` raises, the next ones work."""
    real, calls = getattr(owner, name), []

    def fail_once(*args, **kwargs):
        calls.append(name)
        if len(calls) == 1:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, fail_once)


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_a_failing_stage_leaves_the_dense_model_one_line_and_a_report(stage, monkeypatch, caplog):
    model, x = Net(1), torch.randn(8, D, requires_grad=True)
    once(monkeypatch, *stage, RuntimeError("boom"))
    with caplog.at_level(logging.WARNING, "moepass"):
        y = compiled(model, "eager")(x)
    torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-6)
    y.sum().backward()
    assert all(g is not None for g in gradients(model.parameters())), "the dense weights are what trains"
    assert not list(attached_states(model))
    lines = [r.getMessage() for r in caplog.records if "compiled without the rewrite" in r.getMessage()]
    assert lines == ["compiled without the rewrite: RuntimeError: boom"]
    assert statuses() == [("fallback", "internal_error")]


@pytest.mark.parametrize("stage", [(backend, "recognise"), (backend, "rewrite"), (backend, "_codegen")])
def test_strict_raises_and_leaves_nothing_attached(stage, monkeypatch):
    model, x = Net(1), torch.randn(8, D)
    once(monkeypatch, *stage, RuntimeError("boom"))
    with pytest.raises(Exception, match="boom"):
        compiled(model, "eager", strict=True)(x)
    assert not list(attached_states(model))
    torch._dynamo.reset()
    assert compiled(model, "eager", strict=True)(x).shape == x.shape, "the next compile works"


class Starved(Lowering):
    """A lowering that runs out of memory when it is measured; planned for as the one it stands for."""

    def __init__(self, real: Lowering, error: Exception) -> None:
        self.real, self.error, self.name = real, error, real.name  # type: ignore[misc]

    def legal(self, work):
        return self.real.legal(work)

    def price(self, work, hw):
        return self.real.price(work, hw)

    def build(self, *args):
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"),
        MemoryError(),
    ],
    ids=lambda e: type(e).__name__,
)
def test_running_out_of_memory_while_measuring_removes_that_candidate_only(error, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("MOEPASS_CACHE_DIR", str(tmp_path))
    candidates = {"dense": DenseEinsum(), "grouped": Starved(Grouped(), error)}
    for module in (decide, planner):
        monkeypatch.setattr(module, "lowerings", lambda: candidates)
    monkeypatch.setattr(decide, "shortlist", lambda work, hw, found: dict(found))
    real = measure.measure
    monkeypatch.setattr(decide, "measure", lambda work, found: real(work, found, repeats=1))
    model, x = Net(1), torch.randn(8, D)
    torch.testing.assert_close(compiled(model, "eager", measure=True)(x), model(x), rtol=1e-5, atol=1e-6)
    (site,) = moepass.last_plan().sites
    assert (site.lowering, site.decided_by) == ("dense", "measurement")
    (gone,) = [a for a in site.alternatives if not a.legal]
    assert (gone.lowering, gone.reason) == ("grouped", "failed_to_run")
    assert type(error).__name__ in gone.detail
    assert "grouped could not run and is left out" in caplog.text
