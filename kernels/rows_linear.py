"""One matrix-vector product per routed row: for decoding, where a weight is read for a handful of rows.

``moepass::rows_linear(x_RD, w_END, b_EN?, expert_R) -> y_RN``        row r uses ``w[expert_R[r]]``
``moepass::few_rows_linear(x_RD, w_END, b_EN?, expert_R) -> y_RN``    the same, for few rows under Inductor
``moepass::rows_outer(dy_RN, x_RD, expert_R, E) -> dw_END``           summed per expert, zero where no row

A row whose expert lies outside ``0..E-1`` is not computed: it gives zero and adds nothing to the gradients.

CPU: for a few rows under Inductor its own loop, else our C++ (``kernels.cpu``), else a mat-vec per row; straight from
the stacked weights, never a copy of them (the batched gather of HF's ``batched_mm`` moves the weights three times: 40x
slower at T=512, reference/kernels.md 3c).
Accelerators: gathered bmm.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moepass import _compat
from moepass.kernels import host
from moepass.kernels.cpu import grouped as own
from moepass.kernels.rows import members, sum_by_expert
from moepass.kernels.sorting import sort_by_expert

#: Rows up to which Inductor's own loop is used: a few tokens of 8 choices.  Each reads its weight afresh.
FEW_ROWS = 64

library = torch.library.Library("moepass", "FRAGMENT")
#: The same but for what Inductor makes of the second: its own loop, where calling a custom op costs as much as reading
#: 2 MB.  Two ops, because to Inductor an op has a decomposition or a fallback, never both.
LINEAR = ("rows_linear", "few_rows_linear")
for name in LINEAR:
    library.define(f"{name}(Tensor x_RD, Tensor w_END, Tensor? b_EN, Tensor expert_R) -> Tensor")
library.define("rows_outer(Tensor dy_RN, Tensor x_RD, Tensor expert_R, int E) -> Tensor")


def _linear_cpu(x_RD: Tensor, w_END: Tensor, b_EN: Tensor | None, expert_R: Tensor) -> Tensor:
    y_RN = x_RD.new_empty(x_RD.shape[0], w_END.shape[1])
    if own.fits(x_RD, w_END, b_EN):
        own.linear(x_RD, w_END, b_EN, y_RN, expert_R=expert_R.long())
        return y_RN
    for r, e in enumerate(expert_R.tolist()):
        if not 0 <= e < w_END.shape[0]:
            y_RN[r].zero_()
        elif b_EN is None:
            torch.mv(w_END[e], x_RD[r], out=y_RN[r])
        else:
            torch.addmv(b_EN[e], w_END[e], x_RD[r], out=y_RN[r])
    return y_RN


def _outer_cpu(dy_RN: Tensor, x_RD: Tensor, expert_R: Tensor, E: int) -> Tensor:
    if own.fits_outer(dy_RN, x_RD):
        return _outer_sorted(dy_RN, x_RD, expert_R, E)
    dw_END = dy_RN.new_zeros(E, dy_RN.shape[1], x_RD.shape[1])
    for r, e in enumerate(expert_R.tolist()):
        if 0 <= e < E:
            dw_END[e].addr_(dy_RN[r], x_RD[r])
    return dw_END


def _outer_sorted(dy_RN: Tensor, x_RD: Tensor, expert_R: Tensor, E: int) -> Tensor:
    order_R, _, offsets_E = sort_by_expert(expert_R.unsqueeze(1), E)
    dw_END = host.empty((E, dy_RN.shape[1], x_RD.shape[1]), dy_RN.dtype)
    own.outer(dy_RN[order_R], x_RD[order_R], offsets_E, dw_END)
    return dw_END


def _few_in_pytorch(x_RD: Tensor, w_END: Tensor, b_EN: Tensor | None, expert_R: Tensor) -> Tensor:
    """For a compiler that fuses the gather of weights into the sum; run as it stands it would copy them."""
    wide = torch.promote_types(x_RD.dtype, torch.float32)
    inside_R = expert_R.clamp(0, w_END.shape[0] - 1)
    y_RN = (w_END[inside_R].to(wide) * x_RD.to(wide).unsqueeze(1)).sum(-1)
    y_RN = y_RN if b_EN is None else y_RN + b_EN[inside_R].to(wide)
    return torch.where((inside_R == expert_R).unsqueeze(1), y_RN, 0.0).to(x_RD.dtype)


def _linear_accelerator(x_RD: Tensor, w_END: Tensor, b_EN: Tensor | None, expert_R: Tensor) -> Tensor:
    inside_R = expert_R.clamp(0, w_END.shape[0] - 1)
    y_RN = torch.bmm(w_END.index_select(0, inside_R), x_RD.unsqueeze(-1)).squeeze(-1)
    y_RN = y_RN if b_EN is None else y_RN + b_EN.index_select(0, inside_R)
    return torch.where((inside_R == expert_R).unsqueeze(1), y_RN, 0.0)


def _outer_accelerator(dy_RN: Tensor, x_RD: Tensor, expert_R: Tensor, E: int) -> Tensor:
    member_ER = members(expert_R, E)
    computed_R1 = member_ER.any(0).unsqueeze(1)  # zero times garbage may be NaN
    dy_RN, x_RD = torch.where(computed_R1, dy_RN, 0.0), torch.where(computed_R1, x_RD, 0.0)
    return torch.einsum("er,rn,rd->end", member_ER.to(dy_RN.dtype), dy_RN, x_RD)


def _fake(x_RD: Tensor, w_END: Tensor, b_EN: Tensor | None, expert_R: Tensor) -> Tensor:
    return x_RD.new_empty(x_RD.shape[0], w_END.shape[1])


for name in LINEAR:
    library.impl(name, _linear_cpu, "CPU")
    library.impl(name, _linear_accelerator, "CUDA")
    torch.library.register_fake(f"moepass::{name}", _fake, lib=library)
library.impl("rows_outer", _outer_cpu, "CPU")
library.impl("rows_outer", _outer_accelerator, "CUDA")

#: For ``_compat.decompose_for_inductor``.
DECOMPOSITIONS = {torch.ops.moepass.few_rows_linear.default: _few_in_pytorch}


@torch.library.register_fake("moepass::rows_outer", lib=library)
def _(dy_RN: Tensor, x_RD: Tensor, expert_R: Tensor, E: int) -> Tensor:
    return dy_RN.new_empty(E, dy_RN.shape[1], x_RD.shape[1])


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, Tensor], output: Tensor) -> None:
    x_RD, w_END, b_EN, expert_R = inputs
    ctx.has_bias = b_EN is not None
    ctx.save_for_backward(x_RD, w_END, expert_R)


def _backward(ctx: Any, dy_RN: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    x_RD, w_END, expert_R = ctx.saved_tensors
    needs_x, needs_w, needs_b, _ = ctx.needs_input_grad
    dy_RN = dy_RN.contiguous()
    dx = rows_linear(dy_RN, w_END.transpose(1, 2), None, expert_R) if needs_x else None
    dw = torch.ops.moepass.rows_outer(dy_RN, x_RD, expert_R, w_END.shape[0]) if needs_w else None
    db = sum_by_expert(dy_RN, expert_R, w_END.shape[0]) if ctx.has_bias and needs_b else None
    return dx, dw, db, None


for name in LINEAR:
    torch.library.register_autograd(f"moepass::{name}", _backward, setup_context=_setup, lib=library)


def rows_linear(x_RD: Tensor, w_END: Tensor, b_EN: Tensor | None, expert_R: Tensor) -> Tensor:
    """``y[r] = x[r] @ w[expert[r]].T + b[expert[r]]``: ``[R, D] -> [R, N]``; differentiable."""
    few = _few(x_RD, w_END, b_EN)
    op = torch.ops.moepass.few_rows_linear if few else torch.ops.moepass.rows_linear
    y_RN: Tensor = op(x_RD, w_END, b_EN, expert_R)
    return y_RN


def _few(x_RD: Tensor, w_END: Tensor, b_EN: Tensor | None) -> bool:
    """Few rows, proven to be few (a plan's range is a guard), on the CPU, of weights contiguous along the sum.

    Operands that do not agree go to the op, which refuses them: Inductor's loop would not.
    """
    _, most = _compat.size_bounds(x_RD.shape[0])
    few = most is not None and most <= FEW_ROWS and x_RD.device.type == "cpu"
    return few and w_END.stride(-1) == 1 and own.agree(x_RD, w_END, b_EN)
