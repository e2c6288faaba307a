"""Combine: each token gathers the rows of its K experts and sums them in float32, in the order of k.

Used forward with the routing weights, and backward without them for the gradient of x.  No atomics: the result does
not depend on timing.  Rows without an expert (position -1) are not read.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T"])
def combine(
    y_RD,
    weight_R,
    position_R,
    out_TD,
    T,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``out[t] = sum_k weight[t, k] * y[position[t, k]]``; weight None: 1."""
    COLUMNS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    t = tl.program_id(0) // COLUMNS * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(0) % COLUMNS * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for k in range(K):
        position = tl.load(position_R + t * K + k, mask=t < T, other=-1)
        live = (position >= 0)[:, None] & (d < D)[None, :]
        row = tl.load(y_RD + position.to(tl.int64)[:, None] * D + d[None, :], mask=live, other=0.0).to(tl.float32)
        if weight_R is not None:
            weight = tl.load(weight_R + t * K + k, mask=position >= 0, other=0.0).to(tl.float32)
            row *= weight[:, None]
        total += row
    out = out_TD + t.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(out, total.to(out_TD.dtype.element_ty), mask=(t < T)[:, None] & (d < D)[None, :])
