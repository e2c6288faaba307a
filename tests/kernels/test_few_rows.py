"""One token under Inductor: the products of few rows are Inductor's own loops, and compute what the op computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from moepass.explain.report import PlanReport, SitePlan
from moepass.kernels.rows_linear import DECOMPOSITIONS, FEW_ROWS, rows_linear
from moepass.lowering.plan import TokenRange
from moepass.nn import MoE
from moepass.spec import ExpertSpec, MoESpec, RouterSpec

E, D, F = 5, 24, 40
few = torch.ops.moepass.few_rows_linear.default


def drawn(R: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    expert = torch.randint(-1, E + 1, (R,))
    return torch.randn(R, D).to(dtype), torch.randn(E, F, D).to(dtype), torch.randn(E, F).to(dtype), expert


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
def test_the_decomposition_computes_what_the_op_computes(bias, dtype):
    x, w, b, expert = drawn(9, dtype)
    garbage = ((expert < 0) | (expert >= E)).unsqueeze(1)
    assert garbage.any()
    x = torch.where(garbage, torch.nan, x)
    given = (x, w, b if bias else None, expert)
    ours, op = DECOMPOSITIONS[few](*given), few(*given)
    assert ours.dtype == op.dtype == dtype
    torch.testing.assert_close(ours, op, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)


def test_many_rows_and_transposed_weights_are_left_to_the_op():
    x, w, _, expert = drawn(FEW_ROWS + 1)

    def names(call) -> set[str]:
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            call()
        return {event.key for event in seen.key_averages() if event.key.startswith("moepass::")}

    assert names(lambda: rows_linear(x[:-1], w, None, expert[:-1])) == {"moepass::few_rows_linear"}
    assert names(lambda: rows_linear(x, w, None, expert)) == {"moepass::rows_linear"}
    by_column = w.transpose(1, 2).contiguous().transpose(1, 2)
    assert names(lambda: rows_linear(x[:-1], by_column, None, expert[:-1])) == {"moepass::rows_linear"}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("few", [None, TokenRange(low=1, high=8)], ids=["one token", "a range of few"])
def test_few_compiled_tokens_call_no_custom_op_forward(few, train):
    torch._dynamo.reset()
    torch.manual_seed(0)
    experts = ExpertSpec(num_experts=E, intermediate_size=F, activation="swiglu", bias_in=True, bias_out=True)
    block = MoE(D, MoESpec(router=RouterSpec(top_k=2), experts=experts))
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.2)
    site = SitePlan(id="(root)", kind="moe", status="lowered", lowering="gathered", tokens=few)
    plan = PlanReport(hardware="pinned", device="cpu", sites=(site,))
    compiled = torch.compile(block, backend="moepass", options={"plan": plan, "strict": True}, dynamic=bool(few))
    T = 1 if few is None else 5
    x, upstream = torch.randn(T, D, requires_grad=train), torch.randn(T, D)

    def results(call):
        with torch.set_grad_enabled(train):
            y = call(x)
        return (y, *torch.autograd.grad(y, [x, *block.parameters()], upstream)) if train else (y,)

    results(compiled)
    with profile(activities=[ProfilerActivity.CPU]) as seen, torch.set_grad_enabled(train):
        compiled(x)
    assert not [event.key for event in seen.key_averages() if event.key.startswith("moepass::")]
    for ours, eager in zip(results(compiled), results(block), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)
