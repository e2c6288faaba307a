"""One matrix-vector product per routed row: for decoding, where a weight is read for a handful of rows.

``moepass::rows_linear(x_RD, w_END, b_EN?, expert_R) -> y_RN``        row r uses ``w[expert_R[r]]``
``moepass::rows_outer(dy_RN, x_RD, expert_R, E) -> dw_END``           summed per expert, zero where no row

CPU: a mat-vec per row straight from the stacked weights, never a copy of them (the batched gather of HF's
``batched_mm`` moves the weights three times: 40x slower at T=512, reference/kernels.md 3c).  Accelerators: gathered
bmm.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

library = torch.library.Library("moepass", "FRAGMENT")
library.define("rows_linear(Tensor x_RD, Tensor w_END, Tensor? b_EN, Tensor expert_R) -> Tensor")
library.define("rows_outer(Tensor dy_RN, Tensor x_RD, Tensor expert_R, int E) -> Tensor")


def _linear_cpu(x_RD: Tensor, w_END: Tensor, b_EN: Tensor | None, expert_R: Tensor) -> Tensor:
    y_RN = x_RD.new_empty(x_RD.shape[0], w_END.shape[1])
    for r, e in enumerate(expert_R.tolist()):
        torch.mv(w_END[e], x_RD[r], out=y_RN[r])
    return y_RN if b_EN is None else y_RN.add_(b_EN.index_select(0, expert_R))


def _outer_cpu(dy_RN: Tensor, x_RD: Tensor, expert_R: Tensor, E: int) -> Tensor:
    dw_END = dy_RN.new_zeros(E, dy_RN.shape[1], x_RD.shape[1])
    for r, e in enumerate(expert_R.tolist()):
        dw_END[e].addr_(dy_RN[r], x_RD[r])
    return dw_END


def _linear_accelerator(x_RD: Tensor, w_END: Tensor, b_EN: Tensor | None, expert_R: Tensor) -> Tensor:
    y_RN = torch.bmm(w_END.index_select(0, expert_R), x_RD.unsqueeze(-1)).squeeze(-1)
    return y_RN if b_EN is None else y_RN + b_EN.index_select(0, expert_R)


def _outer_accelerator(dy_RN: Tensor, x_RD: Tensor, expert_R: Tensor, E: int) -> Tensor:
    member_ER = (expert_R == torch.arange(E, device=x_RD.device)[:, None]).to(dy_RN.dtype)
    return torch.einsum("er,rn,rd->end", member_ER, dy_RN, x_RD)


library.impl("rows_linear", _linear_cpu, "CPU")
library.impl("rows_outer", _outer_cpu, "CPU")
library.impl("rows_linear", _linear_accelerator, "CUDA")
library.impl("rows_outer", _outer_accelerator, "CUDA")


@torch.library.register_fake("moepass::rows_linear", lib=library)
def _(x_RD: Tensor, w_END: Tensor, b_EN: Tensor | None, expert_R: Tensor) -> Tensor:
    return x_RD.new_empty(x_RD.shape[0], w_END.shape[1])


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
    db = None
    if ctx.has_bias and needs_b:
        member_ER = expert_R == torch.arange(w_END.shape[0], device=dy_RN.device)[:, None]
        db = (member_ER.to(torch.promote_types(dy_RN.dtype, torch.float32)) @ dy_RN.to(
            torch.promote_types(dy_RN.dtype, torch.float32)
        )).to(dy_RN.dtype)  # fmt: skip
    return dx, dw, db, None


torch.library.register_autograd("moepass::rows_linear", _backward, setup_context=_setup, lib=library)


def rows_linear(x_RD: Tensor, w_END: Tensor, b_EN: Tensor | None, expert_R: Tensor) -> Tensor:
    """``y[r] = x[r] @ w[expert[r]].T + b[expert[r]]``: ``[R, D] -> [R, N]``; differentiable."""
    y_RN: Tensor = torch.ops.moepass.rows_linear(x_RD, w_END, b_EN, expert_R)
    return y_RN
