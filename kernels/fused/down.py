"""Down projection: the hidden rows of an expert times its output projection, in expert order.

y_RD [R, D]  unweighted, with the expert's bias; ``combine`` weighs and sums
"""

from __future__ import annotations

import triton
import triton.language as tl

from moepass.kernels.fused.blocks import contract, tile_at


@triton.jit(do_not_specialize=["TILES"])
def down_projection(
    h_RF,
    w_out,
    b_out,
    offset_E,
    tile_expert,
    tile_row,
    y_RD,
    TILES,
    D: tl.constexpr,
    F: tl.constexpr,
    W_E: tl.constexpr,
    W_D: tl.constexpr,
    W_F: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``y = h @ w_out[expert].T + b_out[expert]`` for the rows of one M-tile and BLOCK_N of the D columns."""
    COLUMNS: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    tile, column = tile_at(tl.program_id(0), TILES, COLUMNS, GROUP)
    expert = tl.load(tile_expert + tile)
    if expert < 0:
        return
    first = tl.load(tile_row + tile)
    height = tl.load(offset_E + expert + 1) - first
    m = tl.arange(0, BLOCK_M)
    d = column * BLOCK_N + tl.arange(0, BLOCK_N)
    wanted = d < D
    h = h_RF + first.to(tl.int64) * F + tl.minimum(m, height - 1) * F
    w = w_out + expert.to(tl.int64) * W_E + d * W_D
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    y = contract(y, h, w, wanted, F, 1, W_F, BLOCK_K, D % BLOCK_N == 0, PRECISION, UPCAST)
    if b_out is not None:
        y += tl.load(b_out + expert * D + d, mask=wanted, other=0.0).to(tl.float32)[None, :]
    stored = (m < height)[:, None] & wanted[None, :]
    out = y_RD + first.to(tl.int64) * D
    tl.store(out + m[:, None] * D + d[None, :], y.to(y_RD.dtype.element_ty), mask=stored)
