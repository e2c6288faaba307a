"""Down projection: the hidden rows of an expert times its output projection, in expert order.

y_RD [R, D]  with the expert's bias; ``combine`` weighs and sums, or only sums where weight_R is given here
"""

from __future__ import annotations

import triton
import triton.language as tl

from moepass.kernels.fused.blocks import (
    contract,
    contract_described,
    row_descriptor,
    tile_at,
    tile_count,
    weight_descriptor,
)


@triton.jit
def down_tile(
    tile,
    expert,
    column,
    h_RF,
    w_out,
    b_out,
    offset_E,
    tile_row,
    y_RD,
    D: tl.constexpr,
    F: tl.constexpr,
    W_E: tl.constexpr,
    W_D: tl.constexpr,
    W_F: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    TMA: tl.constexpr,
    weight_R,
    row_R,
):
    """One tile of ``down_projection``."""
    first = tl.load(tile_row + tile)
    height = tl.load(offset_E + expert + 1) - first
    m = tl.arange(0, BLOCK_M)
    d = column * BLOCK_N + tl.arange(0, BLOCK_N)
    wanted = d < D
    h = h_RF if TMA == 2 else h_RF + first.to(tl.int64) * F + tl.minimum(m, height - 1) * F
    w = w_out if TMA else w_out + expert.to(tl.int64) * W_E + d * W_D
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if TMA:
        y = contract_described(
            y, h, first, w, expert, 0, column * BLOCK_N, F, W_F, TMA, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST
        )
    else:
        y = contract(y, h, w, wanted, F, 1, W_F, BLOCK_K, D % BLOCK_N == 0, PRECISION, UPCAST)
    if b_out is not None:
        y += tl.load(b_out + expert * D + d, mask=wanted, other=0.0).to(tl.float32)[None, :]
    if weight_R is not None:
        r = tl.load(row_R + first + m, mask=m < height, other=0)
        y *= tl.load(weight_R + r, mask=m < height, other=0.0).to(tl.float32)[:, None]
    stored = (m < height)[:, None] & wanted[None, :]
    out = y_RD + first.to(tl.int64) * D
    tl.store(out + m[:, None] * D + d[None, :], y.to(y_RD.dtype.element_ty), mask=stored)


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
    PERSISTENT: tl.constexpr = False,
    E: tl.constexpr = 0,
    BINS: tl.constexpr = 0,
    TMA: tl.constexpr = 0,
    weight_R=None,
    row_R=None,
):
    """``y = h @ w_out[expert].T + b_out[expert]`` for the rows of one M-tile and BLOCK_N of the D columns."""
    COLUMNS: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    if TMA:
        w_out = weight_descriptor(w_out, E, 1, D, F, W_E, W_E, W_D, W_F, BLOCK_N, BLOCK_K)
    if TMA == 2:
        h_RF = row_descriptor(h_RF, offset_E, E, 1, F, BLOCK_M, BLOCK_K)
    if PERSISTENT:
        # As many programs as run at once walk all tiles, and load for the next one while they finish one.
        tiles = tile_count(offset_E, E, BINS, BLOCK_M)
        for program in tl.range(tl.program_id(0), tiles * COLUMNS, tl.num_programs(0), flatten=True):
            tile, column = tile_at(program, tiles, COLUMNS, GROUP)
            expert = tl.load(tile_expert + tile)
            down_tile(
                tile, expert, column, h_RF, w_out, b_out, offset_E, tile_row, y_RD, D, F, W_E, W_D, W_F, BLOCK_M,
                BLOCK_N, BLOCK_K, PRECISION, UPCAST, TMA, weight_R, row_R,
            )  # fmt: skip
    else:
        tile, column = tile_at(tl.program_id(0), TILES, COLUMNS, GROUP)
        expert = tl.load(tile_expert + tile)
        if expert < 0:
            return
        down_tile(
            tile, expert, column, h_RF, w_out, b_out, offset_E, tile_row, y_RD, D, F, W_E, W_D, W_F, BLOCK_M,
            BLOCK_N, BLOCK_K, PRECISION, UPCAST, TMA, weight_R, row_R,
        )  # fmt: skip
