"""A whole model through ``torch.compile(backend="moepass")`` with its plan pinned to the fused kernels.

Collected only by ``tests/kernels/test_fused_interpreted.py``, in a process where the interpreter is on.
"""

from __future__ import annotations

import pytest
import torch

import moepass
from moepass.kernels.fused import ops
from moepass.lowering.registry import lowerings
from moepass.nn import MoE
from moepass.spec import ExpertSpec, MoESpec, RouterSpec
from moepass.verify.subject import pinned

SPEC = MoESpec(
    router=RouterSpec(top_k=2),
    experts=ExpertSpec(num_experts=4, intermediate_size=16, activation="swiglu", bias_in=True, bias_out=True),
)


@pytest.mark.parametrize(("lowering", "saved"), [("fused", True), ("fused_recompute", False)])
def test_a_compiled_block_trains_by_the_fused_kernels_as_it_does_eagerly(lowering, saved, tmp_path, monkeypatch):
    made = []
    problem_of = ops.problem_of
    monkeypatch.setattr(ops, "problem_of", lambda *a, **k: made.append(problem_of(*a, **k)) or made[-1])
    torch.manual_seed(0)
    block, x = MoE(16, SPEC), torch.randn(6, 16, requires_grad=True)
    path = tmp_path / "plan.json"
    path.write_text(pinned(moepass.explain(block)(x), lowering).to_json())
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="moepass", options={"plan": str(path)})
    leaves = [x, *block.parameters()]
    got = compiled(x)
    gradients = torch.autograd.grad(got.square().sum(), leaves)
    assert {s.lowering for s in moepass.last_plan().sites} == {lowering}
    assert {problem.save for problem in made} == {saved}
    wanted = block(x)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(gradients, torch.autograd.grad(wanted.square().sum(), leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_eager_calls_on_an_interpreted_cpu_do_not_take_the_fused_kernels(monkeypatch):
    def build(*_):
        raise AssertionError("the interpreter is for tests")

    monkeypatch.setattr(type(lowerings()["fused"]), "build", build)
    MoE(16, SPEC)(torch.randn(3, 16)).sum().backward()
