"""The up-projection of routed tokens on the CPU: a grouped GEMM that takes its rows from the tokens, without a copy.

``moepass::taken_linear(x_TD, order_R, inverse_R, K, w_END, b_EN?, offsets_E) -> y_RN``
    ``y[r] = x[order[r] // K] @ w[e].T + b[e]`` for the rows r of expert e; ``order``, ``inverse`` and ``offsets`` as
    ``sort_by_expert`` gives them.  What ``grouped_linear`` says of rows behind the offsets holds here.
``moepass::taken_outer(dy_RN, x_TD, order_R, K, offsets_E) -> dw_END``    zero for an expert without rows

Our C++ packs the rows of x anyhow, from wherever they stand: a copy of K rows a token would be written, read, and,
where it is large, faulted in page by page.  Training keeps x instead of that copy.  Where the C++ does not serve, the
copy is made and ``grouped_linear``'s products take it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moepass.kernels import host
from moepass.kernels.cpu import grouped as own
from moepass.kernels.grouped_linear import grouped_linear, weight_gradient
from moepass.kernels.rows import take_rows

library = torch.library.Library("moepass", "FRAGMENT")
library.define(
    "taken_linear(Tensor x_TD, Tensor order_R, Tensor inverse_R, SymInt K, Tensor w_END, Tensor? b_EN, "
    "Tensor offsets_E) -> Tensor"
)
library.define("taken_outer(Tensor dy_RN, Tensor x_TD, Tensor order_R, SymInt K, Tensor offsets_E) -> Tensor")


def _copied(x_TD: Tensor, order_R: Tensor, K: int) -> Tensor:
    return x_TD.index_select(0, order_R // K)


def _linear(
    x_TD: Tensor, order_R: Tensor, inverse_R: Tensor, K: int, w_END: Tensor, b_EN: Tensor | None, offsets_E: Tensor
) -> Tensor:
    if not own.fits(x_TD, w_END, b_EN) or own.most_rows(x_TD.dtype) != own.ANY:
        return grouped_linear(_copied(x_TD, order_R, K), w_END, b_EN, offsets_E)
    y_RN = host.empty((order_R.shape[0], w_END.shape[1]), x_TD.dtype)
    own.linear(x_TD, w_END, b_EN, y_RN, offsets_E=offsets_E, order_R=order_R, per=K)
    return y_RN


def _outer(dy_RN: Tensor, x_TD: Tensor, order_R: Tensor, K: int, offsets_E: Tensor) -> Tensor:
    dw_END: Tensor
    if not own.fits_outer(dy_RN, x_TD) or own.most_rows(x_TD.dtype) != own.ANY:
        dw_END = torch.ops.moepass.grouped_outer(dy_RN, _copied(x_TD, order_R, K), offsets_E, False, False)
        return dw_END
    dw_END = host.empty((offsets_E.shape[0], dy_RN.shape[1], x_TD.shape[1]), x_TD.dtype)
    own.outer(dy_RN, x_TD, offsets_E, dw_END, order_R=order_R, per=K)
    return dw_END


library.impl("taken_linear", _linear, "CPU")
library.impl("taken_outer", _outer, "CPU")


@torch.library.register_fake("moepass::taken_linear", lib=library)
def _(
    x_TD: Tensor, order_R: Tensor, inverse_R: Tensor, K: int, w_END: Tensor, b_EN: Tensor | None, offsets_E: Tensor
) -> Tensor:
    return x_TD.new_empty(order_R.shape[0], w_END.shape[1])


@torch.library.register_fake("moepass::taken_outer", lib=library)
def _(dy_RN: Tensor, x_TD: Tensor, order_R: Tensor, K: int, offsets_E: Tensor) -> Tensor:
    return dy_RN.new_empty(offsets_E.shape[0], dy_RN.shape[1], x_TD.shape[1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_TD, order_R, inverse_R, ctx.K, w_END, b_EN, offsets_E = inputs
    ctx.has_bias = b_EN is not None
    ctx.save_for_backward(x_TD, order_R, inverse_R, w_END, offsets_E)


def _backward(ctx: Any, dy_RN: Tensor) -> tuple[Tensor | None, ...]:
    x_TD, order_R, inverse_R, w_END, offsets_E = ctx.saved_tensors
    needs_x, _, _, _, needs_w, needs_b, _ = ctx.needs_input_grad
    dx_TD = dw_END = None
    if needs_x:
        dx_RD = grouped_linear(dy_RN, w_END.transpose(1, 2), None, offsets_E)
        dx_TD = take_rows(dx_RD, inverse_R.view(x_TD.shape[0], ctx.K), None)
    if needs_w and w_END.stride(-1) == 1:
        dw_END = torch.ops.moepass.taken_outer(dy_RN, x_TD, order_R, ctx.K, offsets_E)
    elif needs_w:
        dw_END = weight_gradient(dy_RN, _copied(x_TD, order_R, ctx.K), w_END, offsets_E, False, False)
    db_EN = torch.ops.moepass.grouped_sum(dy_RN, offsets_E, False) if ctx.has_bias and needs_b else None
    return dx_TD, None, None, None, dw_END, db_EN, None


torch.library.register_autograd("moepass::taken_linear", _backward, setup_context=_setup, lib=library)


def taken_linear(
    x_TD: Tensor, order_R: Tensor, inverse_R: Tensor, K: int, w_END: Tensor, b_EN: Tensor | None, offsets_E: Tensor
) -> Tensor:
    """``[T, D] -> [R, N]``, R = T*K rows sorted by expert; differentiable in x, w and b (see the module)."""
    y_RN: Tensor = torch.ops.moepass.taken_linear(x_TD, order_R, inverse_R, K, w_END, b_EN, offsets_E)
    return y_RN
