"""Up projection: the tokens of an expert, gathered in the A-load, times its input projections, activated.

    z_RN [R, n*F]  pre-activations in expert order, gate before up (None: not kept)
    h_RF [R, F]    the pointwise program of them (None: only z is wanted, to recompute it)

One tile of the result holds the same features of both projections, so the program is the epilogue.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moepass.kernels.fused.blocks import (
    dot,
    projection_row,
    tile_at,
    tile_count,
    weight_descriptor,
    weight_tile,
)


@triton.jit
def up_tile(
    tile,
    expert,
    column,
    x_TD,
    w_in,
    b_in,
    row_R,
    offset_E,
    tile_row,
    z_RN,
    h_RF,
    VALUE: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    W_E: tl.constexpr,
    W_N: tl.constexpr,
    W_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    TMA: tl.constexpr,
):
    """One tile of ``up_projection``."""
    first = tl.load(tile_row + tile)
    m = tl.arange(0, BLOCK_M)
    computed = m < tl.load(offset_E + expert + 1) - first
    token = tl.load(row_R + first + m, mask=computed, other=0) // K
    feature = column * BLOCK_N + tl.arange(0, BLOCK_N)
    wanted = feature < F
    if not TMA:
        weights = w_in + expert.to(tl.int64) * W_E

    k = tl.arange(0, BLOCK_K)
    x = x_TD + token.to(tl.int64)[:, None] * D + k[None, :]
    if not TMA:
        w_g = weights + projection_row(feature, 0, F, INTERLEAVED)[None, :] * W_N + k[:, None] * W_D
    g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if N == 2:
        if not TMA:
            w_u = weights + projection_row(feature, 1, F, INTERLEAVED)[None, :] * W_N + k[:, None] * W_D
        u = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        inside = k < D - start
        if D % BLOCK_K == 0:
            x_tile = tl.load(x)
        else:
            x_tile = tl.load(x, mask=inside[None, :], other=0.0)
        if TMA:
            w_tile = weight_tile(w_in, expert, 0, column * BLOCK_N, start, W_D, BLOCK_N, BLOCK_K)
            g = dot(x_tile, w_tile, g, PRECISION, UPCAST)
            if N == 2:
                w_tile = weight_tile(w_in, expert, 1, column * BLOCK_N, start, W_D, BLOCK_N, BLOCK_K)
                u = dot(x_tile, w_tile, u, PRECISION, UPCAST)
        elif D % BLOCK_K == 0 and F % BLOCK_N == 0:
            g = dot(x_tile, tl.load(w_g), g, PRECISION, UPCAST)
            if N == 2:
                u = dot(x_tile, tl.load(w_u), u, PRECISION, UPCAST)
        else:
            w_mask = inside[:, None] & wanted[None, :]
            g = dot(x_tile, tl.load(w_g, mask=w_mask, other=0.0), g, PRECISION, UPCAST)
            if N == 2:
                u = dot(x_tile, tl.load(w_u, mask=w_mask, other=0.0), u, PRECISION, UPCAST)
        x += BLOCK_K
        if not TMA:
            w_g += BLOCK_K * W_D
            if N == 2:
                w_u += BLOCK_K * W_D

    if b_in is not None:
        bias = b_in + expert * (N * F)
        row = projection_row(feature, 0, F, INTERLEAVED)
        g += tl.load(bias + row, mask=wanted, other=0.0).to(tl.float32)[None, :]
        if N == 2:
            row = projection_row(feature, 1, F, INTERLEAVED)
            u += tl.load(bias + row, mask=wanted, other=0.0).to(tl.float32)[None, :]
    stored = computed[:, None] & wanted[None, :]
    if z_RN is not None:
        z = z_RN + first.to(tl.int64) * (N * F) + (m[:, None] * (N * F) + feature[None, :])
        tl.store(z, g.to(z_RN.dtype.element_ty), mask=stored)
        if N == 2:
            tl.store(z + F, u.to(z_RN.dtype.element_ty), mask=stored)
    if h_RF is not None:
        if N == 2:
            h = VALUE(g, u)
        else:
            h = VALUE(g, g)
        out = h_RF + first.to(tl.int64) * F
        tl.store(out + (m[:, None] * F + feature[None, :]), h.to(h_RF.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["TILES"])
def up_projection(
    x_TD,
    w_in,
    b_in,
    row_R,
    offset_E,
    tile_expert,
    tile_row,
    z_RN,
    h_RF,
    TILES,
    VALUE: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    W_E: tl.constexpr,
    W_N: tl.constexpr,
    W_D: tl.constexpr,
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
):
    """``h = program(x[token] @ w_in[expert].T + b_in[expert])`` for the rows of one M-tile and BLOCK_N features."""
    COLUMNS: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    if TMA:
        PART: tl.constexpr = W_E if N == 1 else W_N if INTERLEAVED else F * W_N
        STEP: tl.constexpr = 2 * W_N if INTERLEAVED and N == 2 else W_N
        w_in = weight_descriptor(w_in, E, N, F, D, W_E, PART, STEP, W_D, BLOCK_N, BLOCK_K)
    if PERSISTENT:
        # As many programs as run at once walk all tiles, and load for the next one while they finish one.
        tiles = tile_count(offset_E, E, BINS, BLOCK_M)
        for program in tl.range(tl.program_id(0), tiles * COLUMNS, tl.num_programs(0), flatten=True):
            tile, column = tile_at(program, tiles, COLUMNS, GROUP)
            expert = tl.load(tile_expert + tile)
            up_tile(
                tile, expert, column, x_TD, w_in, b_in, row_R, offset_E, tile_row, z_RN, h_RF, VALUE, D, F, K, N,
                INTERLEAVED, W_E, W_N, W_D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST, TMA,
            )  # fmt: skip
    else:
        tile, column = tile_at(tl.program_id(0), TILES, COLUMNS, GROUP)
        expert = tl.load(tile_expert + tile)
        if expert < 0:
            return
        up_tile(
            tile, expert, column, x_TD, w_in, b_in, row_R, offset_E, tile_row, z_RN, h_RF, VALUE, D, F, K, N,
            INTERLEAVED, W_E, W_N, W_D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST, TMA,
        )  # fmt: skip
