"""Moving rows: gathers whose backward is again a gather, so that nothing is ever scattered with atomics.

A routed row has one token and a token has K routed rows.  Both directions are known as index tables, so the adjoint of
"copy token rows to expert order" is "gather each token's K rows and sum", in float32 and in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Gather(torch.autograd.Function):
    """``y[i] = x[take[i]]`` (zero where ``valid`` is false); adjoint through ``back`` (``[N]`` or ``[N, K]``)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, take: Tensor, valid: Tensor | None, back: Tensor, back_valid: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(back, back_valid)
        return take_rows(x, take, valid)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        back, back_valid = ctx.saved_tensors
        return take_rows(grads[0], back, back_valid), None, None, None, None


def take_rows(x: Tensor, take: Tensor, valid: Tensor | None) -> Tensor:
    """Rows of x; a two-dimensional table sums its second dimension in float32."""
    y = x.index_select(0, take.reshape(-1))
    if valid is not None:
        y = torch.where(valid.reshape(-1, 1), y, 0.0)
    if take.dim() == 1:
        return y
    wide = torch.promote_types(y.dtype, torch.float32)
    return y.view(*take.shape, x.shape[-1]).to(wide).sum(1).to(x.dtype)


def gather(
    x: Tensor, take: Tensor, back: Tensor, *, valid: Tensor | None = None, back_valid: Tensor | None = None
) -> Tensor:
    """``x[take]`` with ``back`` as the adjoint's table.

    ``x [N, D]``, ``take [M]`` int64 into N, ``back [N]`` or ``[N, K]`` int64 into M; ``valid``/``back_valid`` mark the
    table entries that count.  The caller vouches that the two tables are each other's transpose.
    """
    y: Tensor = _Gather.apply(x, take, valid, back, back_valid)  # type: ignore[no-untyped-call]
    return y


def members(expert_R: Tensor, E: int) -> Tensor:
    """``[E, R]`` bool: which rows are whose; rows outside ``0..E-1`` are nobody's."""
    return expert_R == torch.arange(E, device=expert_R.device)[:, None]


def sum_by_expert(x_RN: Tensor, expert_R: Tensor, E: int) -> Tensor:
    """``[E, N]``: the sum of each expert's rows in float32 (float64 for float64), in x's dtype.

    Rows whose expert lies outside ``0..E-1`` are not read.  A one-hot product, not ``index_add``: that is atomic on
    accelerators, and not deterministic.
    """
    wide = torch.promote_types(x_RN.dtype, torch.float32)
    member_ER = members(expert_R, E)
    rows = torch.where(member_ER.any(0).unsqueeze(1), x_RN.to(wide), 0.0)  # zero times garbage may be NaN
    return (member_ER.to(wide) @ rows).to(x_RN.dtype)


#: Choices that the weighted sum is written out for.
_UNROLLED = 16


class _Combine(torch.autograd.Function):
    """``sum_k weight[t,k] * y[t,k]`` in the wide dtype; the adjoint is two broadcast products."""

    @staticmethod
    def forward(ctx: Any, y_TKD: Tensor, weight_TK: Tensor) -> Tensor:
        ctx.save_for_backward(y_TKD, weight_TK)
        return _weighted_sum(y_TKD, weight_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        y_TKD, weight_TK = ctx.saved_tensors
        needs_y, needs_weight = ctx.needs_input_grad
        grad_T1D = grads[0].unsqueeze(1)
        dy = (grad_T1D * weight_TK.unsqueeze(-1)).to(y_TKD.dtype) if needs_y else None
        return dy, (grad_T1D * y_TKD).sum(-1) if needs_weight else None


def _weighted_sum(y_TKD: Tensor, weight_TK: Tensor) -> Tensor:
    """Written out over K, so that a compiler's inner loop runs along D: over K it would fetch single elements."""
    K, wide = y_TKD.shape[1], weight_TK.dtype
    if K == 0 or K > _UNROLLED:
        return (y_TKD.to(wide) * weight_TK.unsqueeze(-1)).sum(1)
    total_TD = y_TKD[:, 0].to(wide) * weight_TK[:, :1]
    for k in range(1, K):
        # Not addcmul: its fake (torch 2.13) cannot broadcast symbolic sizes.
        total_TD = total_TD + y_TKD[:, k].to(wide) * weight_TK[:, k : k + 1]
    return total_TD


def combine(y_TKD: Tensor, weight_TK: Tensor, dtype: torch.dtype) -> Tensor:
    """``sum_k weight[t,k] * y[t,k]`` accumulated in float32 (float64 for float64), returned in ``dtype``."""
    wide = torch.promote_types(y_TKD.dtype, torch.float32)
    y_TD: Tensor = _Combine.apply(y_TKD, weight_TK.to(wide))  # type: ignore[no-untyped-call]
    return y_TD.to(dtype)
