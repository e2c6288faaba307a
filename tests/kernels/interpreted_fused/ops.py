"""The fused ops as ops: torch's own opcheck, partial gradients, refusals, and a whole compiled model.

Collected only by ``tests/kernels/test_fused_interpreted.py``, in a process where the interpreter is on.
"""

from __future__ import annotations

import pytest
import torch
from fused_cases import Case
from torch.library import opcheck

from moepass import errors
from moepass.kernels.fused import runner
from moepass.kernels.fused.ops import fused_experts

SMALL = Case(T=3, D=16, F=16, E=3, bias=True)


def operands(case: Case, *, requires_grad: bool = True) -> list[torch.Tensor]:
    """x, index, weight, w_in, w_out, b_in, b_out in float32."""
    leaves = {name: t.detach().float().requires_grad_(requires_grad) for name, t in case.leaves().items()}
    x, weight, *weights = leaves.values()
    return [x, case.index(), weight, *weights]


@pytest.mark.parametrize("save", [False, True])
def test_the_forward_op_passes_opcheck(save):
    opcheck(torch.ops.moepass.fused_experts.default, (*operands(SMALL), "silu(g)*u", False, save))


@pytest.mark.parametrize("needs", [(True,) * 6, (False, True, False, True, False, False)])
def test_the_backward_op_passes_opcheck(needs):
    given = operands(SMALL, requires_grad=False)
    given[3] = given[3].transpose(1, 2).contiguous().transpose(1, 2)
    _, z = torch.ops.moepass.fused_experts(*given, "silu(g)*u", False, True)
    arguments = (torch.ones_like(given[0]), *given, z, "silu(g)*u", False, list(needs))
    opcheck(torch.ops.moepass.fused_experts_backward.default, arguments)


def test_a_gradient_that_is_not_wanted_is_not_computed_and_the_others_are_the_same():
    given = operands(SMALL)
    wanted = torch.autograd.grad(fused_experts(*given, activation="swiglu").sum(), [given[0], given[4]])
    for t in (given[2], given[3], given[5], given[6]):
        t.requires_grad_(False)
    got = torch.autograd.grad(fused_experts(*given, activation="swiglu").sum(), [given[0], given[4]])
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_weight_gradients_lie_in_memory_as_the_weights_do():
    given = operands(SMALL)
    given[3] = given[3].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    fused_experts(*given, activation="swiglu").sum().backward()
    assert given[3].grad.stride() == given[3].stride()
    assert given[4].grad.stride() == given[4].stride()


def test_values_behind_sentinels_are_never_read():
    case = Case(T=6, D=16, F=16, E=3, bias=True, routing="sentinels")
    given = operands(case)
    outside = (given[1] < 0) | (given[1] >= case.E)
    x = torch.where(outside.all(1, keepdim=True), torch.nan, given[0].detach()).requires_grad_()
    weight = torch.where(outside, torch.nan, given[2].detach()).requires_grad_()
    y = fused_experts(x, given[1], weight, *given[3:], activation="swiglu")
    y.sum().backward()
    assert outside.all(1).any()
    assert y.isfinite().all()
    assert torch.equal(weight.grad[outside], torch.zeros(int(outside.sum())))
    assert all(t.grad.isfinite().all() for t in (x, weight, *given[3:]))


def test_mixed_dtypes_and_widths_that_do_not_fit_are_refused_by_name():
    given = operands(SMALL, requires_grad=False)
    with pytest.raises(errors.FusedOperands, match="w_in is float16"):
        fused_experts(*given[:3], given[3].half(), *given[4:], activation="swiglu")
    with pytest.raises(errors.FusedOperands, match=r"x \(3, 16\)"):
        fused_experts(*given[:3], given[3][:, :, :8], *given[4:], activation="swiglu")
    with pytest.raises(errors.FusedOperands, match="float64"):
        fused_experts(*(t.double() if t.is_floating_point() else t for t in given), activation="swiglu")


def test_without_the_interpreter_the_cpu_is_refused(monkeypatch):
    monkeypatch.setattr(runner, "interpreting", lambda: False)
    with pytest.raises(errors.FusedUnavailable, match="TRITON_INTERPRET=1"):
        fused_experts(*operands(SMALL), activation="swiglu")
