"""Backward through the experts, row by row: no output of the forward pass is kept but the pre-activations.

With dy the gradient of a token's output, s its routing weight and A = program(z) the hidden row:

    dA' = dy @ w_out         unweighted;  dA = s * dA'
    dz  = program'(z, dA)    in the epilogue, which also writes s * A for the gradient of w_out
    ds  = dA' . A + dy . b_out    a sum per tile of features (``partial_RP``), added up in ``routing_gradient``
    dx  = dz @ w_in          in expert order; ``combine`` sums the K rows of a token

Source: SonicMoE (2512.14080).  No atomics.
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
def hidden_epilogue(
    da,
    weight,
    computed,
    first,
    feature,
    z_RN,
    dz_RN,
    sh_RF,
    VALUE: tl.constexpr,
    GRAD: tl.constexpr,
    F: tl.constexpr,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """From dA' of some features: writes dz and s * A; returns each row's share of ds."""
    m = tl.arange(0, BLOCK_M)
    stored = computed[:, None] & (feature < F)[None, :]
    place = m[:, None] * (N * F) + feature[None, :]
    z = z_RN + first * (N * F)
    g = tl.load(z + place, mask=stored, other=0.0).to(tl.float32)
    if N == 2:
        u = tl.load(z + F + place, mask=stored, other=0.0).to(tl.float32)
    else:
        u = g
    h = VALUE(g, u)
    partial = tl.sum(tl.where(stored, da * h, 0.0), 1)
    if sh_RF is not None:
        sh = (weight[:, None] * h).to(sh_RF.dtype.element_ty)
        tl.store(sh_RF + first * F + (m[:, None] * F + feature[None, :]), sh, mask=stored)
    if dz_RN is not None:
        dg, du = GRAD(g, u, weight[:, None] * da)
        dz = dz_RN + first * (N * F)
        tl.store(dz + place, dg.to(dz_RN.dtype.element_ty), mask=stored)
        if N == 2:
            tl.store(dz + F + place, du.to(dz_RN.dtype.element_ty), mask=stored)
    return partial


@triton.jit
def hidden_tile(
    tile,
    expert,
    column,
    dy_TD,
    w_out,
    z_RN,
    weight_R,
    row_R,
    offset_E,
    tile_row,
    dz_RN,
    sh_RF,
    partial_RP,
    VALUE: tl.constexpr,
    GRAD: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    COLUMNS: tl.constexpr,
    W_E: tl.constexpr,
    W_D: tl.constexpr,
    W_F: tl.constexpr,
    HALVES: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
):
    """One tile of ``hidden_gradient``."""
    first = tl.load(tile_row + tile).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    computed = m < tl.load(offset_E + expert + 1) - first
    r = tl.load(row_R + first + m, mask=computed, other=0)
    feature = column * BLOCK_N + tl.arange(0, BLOCK_N)
    weight = tl.load(weight_R + r, mask=computed, other=0.0).to(tl.float32)

    dy = dy_TD + (r // K).to(tl.int64) * D
    w = w_out if TMA else w_out + expert.to(tl.int64) * W_E + feature * W_F
    da = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if TMA:
        da = contract_described(
            da, dy, first, w, expert, 0, column * BLOCK_N, D, W_D, TMA, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST
        )
    else:
        da = contract(da, dy, w, feature < F, D, 1, W_D, BLOCK_K, F % BLOCK_N == 0, PRECISION, UPCAST)

    if HALVES:
        halves = tl.permute(tl.reshape(da, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
        low, high = tl.split(halves)
        half = column * BLOCK_N + tl.arange(0, BLOCK_N // 2)
        partial = hidden_epilogue(low, weight, computed, first, half, z_RN, dz_RN, sh_RF, VALUE, GRAD, F, N, BLOCK_M)
        half += BLOCK_N // 2
        partial += hidden_epilogue(high, weight, computed, first, half, z_RN, dz_RN, sh_RF, VALUE, GRAD, F, N, BLOCK_M)
    else:
        partial = hidden_epilogue(da, weight, computed, first, feature, z_RN, dz_RN, sh_RF, VALUE, GRAD, F, N, BLOCK_M)
    if partial_RP is not None:
        tl.store(partial_RP + (first + m) * COLUMNS + column, partial, mask=computed)


@triton.jit(do_not_specialize=["TILES"])
def hidden_gradient(
    dy_TD,
    w_out,
    z_RN,
    weight_R,
    row_R,
    offset_E,
    tile_expert,
    tile_row,
    dz_RN,
    sh_RF,
    partial_RP,
    TILES,
    VALUE: tl.constexpr,
    GRAD: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    W_E: tl.constexpr,
    W_D: tl.constexpr,
    W_F: tl.constexpr,
    HALVES: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PERSISTENT: tl.constexpr = False,
    E: tl.constexpr = 0,
    BINS: tl.constexpr = 0,
    TMA: tl.constexpr = 0,
):
    """dz, s * A and the partial sums of ds for the rows of one M-tile and BLOCK_N features.

    HALVES: half of the features at a time after the product, or the epilogue's five blocks spill registers.
    """
    COLUMNS: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    if TMA:
        w_out = weight_descriptor(w_out, E, 1, F, D, W_E, W_E, W_F, W_D, BLOCK_N, BLOCK_K)
    if PERSISTENT:
        # As many programs as run at once walk all tiles.  Loads of the next one beside this epilogue would spill.
        tiles = tile_count(offset_E, E, BINS, BLOCK_M)
        for program in tl.range(tl.program_id(0), tiles * COLUMNS, tl.num_programs(0)):
            tile, column = tile_at(program, tiles, COLUMNS, GROUP)
            expert = tl.load(tile_expert + tile)
            hidden_tile(
                tile, expert, column, dy_TD, w_out, z_RN, weight_R, row_R, offset_E, tile_row, dz_RN, sh_RF,
                partial_RP, VALUE, GRAD, D, F, K, N, COLUMNS, W_E, W_D, W_F, HALVES, PRECISION, UPCAST, BLOCK_M,
                BLOCK_N, BLOCK_K, TMA,
            )  # fmt: skip
    else:
        tile, column = tile_at(tl.program_id(0), TILES, COLUMNS, GROUP)
        expert = tl.load(tile_expert + tile)
        if expert < 0:
            return
        hidden_tile(
            tile, expert, column, dy_TD, w_out, z_RN, weight_R, row_R, offset_E, tile_row, dz_RN, sh_RF,
            partial_RP, VALUE, GRAD, D, F, K, N, COLUMNS, W_E, W_D, W_F, HALVES, PRECISION, UPCAST, BLOCK_M,
            BLOCK_N, BLOCK_K, TMA,
        )  # fmt: skip


@triton.jit
def x_tile(
    tile,
    expert,
    column,
    dz_RN,
    w_in,
    offset_E,
    tile_row,
    dx_RD,
    D: tl.constexpr,
    F: tl.constexpr,
    N: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    W_E: tl.constexpr,
    W_N: tl.constexpr,
    W_D: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
):
    """One tile of ``x_gradient``."""
    STEP: tl.constexpr = 2 * W_N if INTERLEAVED else W_N
    SECOND: tl.constexpr = W_N if INTERLEAVED else F * W_N
    EVEN: tl.constexpr = D % BLOCK_N == 0
    first = tl.load(tile_row + tile)
    height = tl.load(offset_E + expert + 1) - first
    m = tl.arange(0, BLOCK_M)
    d = column * BLOCK_N + tl.arange(0, BLOCK_N)
    wanted = d < D
    dz = dz_RN if TMA == 2 else dz_RN + first.to(tl.int64) * (N * F) + tl.minimum(m, height - 1) * (N * F)
    w = w_in if TMA else w_in + expert.to(tl.int64) * W_E + d * W_D
    dx = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if TMA:
        start = column * BLOCK_N
        dx = contract_described(
            dx, dz, first, w, expert, 0, start, F, STEP, TMA, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST
        )
        if N == 2:
            dz = dz_RN if TMA == 2 else dz + F
            dx = contract_described(
                dx, dz, first, w, expert, 1, start, F, STEP, TMA, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST
            )
    else:
        dx = contract(dx, dz, w, wanted, F, 1, STEP, BLOCK_K, EVEN, PRECISION, UPCAST)
        if N == 2:
            dx = contract(dx, dz + F, w + SECOND, wanted, F, 1, STEP, BLOCK_K, EVEN, PRECISION, UPCAST)
    stored = (m < height)[:, None] & wanted[None, :]
    out = dx_RD + first.to(tl.int64) * D
    tl.store(out + m[:, None] * D + d[None, :], dx.to(dx_RD.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["TILES"])
def x_gradient(
    dz_RN,
    w_in,
    offset_E,
    tile_expert,
    tile_row,
    dx_RD,
    TILES,
    D: tl.constexpr,
    F: tl.constexpr,
    N: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    W_E: tl.constexpr,
    W_N: tl.constexpr,
    W_D: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PERSISTENT: tl.constexpr = False,
    E: tl.constexpr = 0,
    BINS: tl.constexpr = 0,
    TMA: tl.constexpr = 0,
):
    """``dx = dz @ w_in[expert]`` for the rows of one M-tile and BLOCK_N of the D columns.

    Gate and up are two loops, one after the other: two products into one accumulator within an iteration are
    miscompiled on sm_100 (triton issue 10821).
    """
    COLUMNS: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    if TMA:
        PART: tl.constexpr = W_E if N == 1 else W_N if INTERLEAVED else F * W_N
        STEP: tl.constexpr = 2 * W_N if INTERLEAVED and N == 2 else W_N
        w_in = weight_descriptor(w_in, E, N, D, F, W_E, PART, W_D, STEP, BLOCK_N, BLOCK_K)
    if TMA == 2:
        dz_RN = row_descriptor(dz_RN, offset_E, E, N, F, BLOCK_M, BLOCK_K)
    if PERSISTENT:
        # As many programs as run at once walk all tiles, and load for the next one while they finish one.
        tiles = tile_count(offset_E, E, BINS, BLOCK_M)
        for program in tl.range(tl.program_id(0), tiles * COLUMNS, tl.num_programs(0), flatten=True):
            tile, column = tile_at(program, tiles, COLUMNS, GROUP)
            expert = tl.load(tile_expert + tile)
            x_tile(
                tile, expert, column, dz_RN, w_in, offset_E, tile_row, dx_RD, D, F, N, INTERLEAVED, W_E, W_N, W_D,
                PRECISION, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K, TMA,
            )  # fmt: skip
    else:
        tile, column = tile_at(tl.program_id(0), TILES, COLUMNS, GROUP)
        expert = tl.load(tile_expert + tile)
        if expert < 0:
            return
        x_tile(
            tile, expert, column, dz_RN, w_in, offset_E, tile_row, dx_RD, D, F, N, INTERLEAVED, W_E, W_N, W_D,
            PRECISION, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K, TMA,
        )  # fmt: skip


@triton.jit(do_not_specialize=["R"])
def routing_gradient(
    partial_RP,
    dy_TD,
    b_out,
    index_R,
    position_R,
    dweight_R,
    R,
    D: tl.constexpr,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``ds[r]``: its partial sums and, with a bias, ``dy . b_out[expert]``; zero without an expert."""
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    position = tl.load(position_R + r, mask=r < R, other=-1)
    computed = (position >= 0)[:, None]
    sums = tl.zeros((BLOCK, BLOCK_P), tl.float32)
    for start in range(0, PARTS, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        place = partial_RP + position.to(tl.int64)[:, None] * PARTS + part[None, :]
        sums += tl.load(place, mask=computed & (part < PARTS)[None, :], other=0.0)
    ds = tl.sum(sums, 1)
    if b_out is not None:
        expert = tl.load(index_R + r, mask=position >= 0, other=0).to(tl.int64)
        dy_rows = dy_TD + (r // K).to(tl.int64)[:, None] * D
        products = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            read = computed & (d < D)[None, :]
            dy = tl.load(dy_rows + d[None, :], mask=read, other=0.0).to(tl.float32)
            products += dy * tl.load(b_out + expert[:, None] * D + d[None, :], mask=read, other=0.0).to(tl.float32)
        ds += tl.sum(products, 1)
    tl.store(dweight_R + r, ds.to(dweight_R.dtype.element_ty), mask=r < R)
