"""Gradients of the weights: products and sums over the rows of an expert, in float32, zero for an expert without rows.

The contraction runs over a ragged dimension, so the rows behind an expert's last are masked on both sides.  Every tile
of every expert is written by one program: no atomics, and nothing has to be zero beforehand.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moepass.kernels.fused.blocks import dot


@triton.jit
def stacked_row(feature, F: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Row of ``w_in`` of a stacked feature: the gate's are 0..F-1, the up projection's F..2*F-1."""
    if INTERLEAVED:
        return tl.where(feature < F, 2 * feature, 2 * (feature - F) + 1)
    return feature


@triton.jit
def outer_gradient(
    a,
    b,
    row_R,
    offset_E,
    out,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GATHER_A: tl.constexpr,
    GATHER_B: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    O_E: tl.constexpr,
    O_M: tl.constexpr,
    O_N: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``out[e] [M, N] = sum_rows a[row]^T b[row]``; a gathered operand has tokens for rows, the other positions."""
    COLUMNS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    TILES: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M * COLUMNS
    expert = tl.program_id(0) // TILES
    tile = tl.program_id(0) % TILES
    m = tile // COLUMNS * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile % COLUMNS * BLOCK_N + tl.arange(0, BLOCK_N)
    end = tl.load(offset_E + expert + 1)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(tl.load(offset_E + expert), end, BLOCK_K):
        position = start + tl.arange(0, BLOCK_K)
        live = position < end
        if GATHER_A or GATHER_B:
            token = (tl.load(row_R + position, mask=live, other=0) // K).to(tl.int64)
        a_row = token if GATHER_A else position.to(tl.int64)
        b_row = token if GATHER_B else position.to(tl.int64)
        a_tile = tl.load(a + a_row[None, :] * M + m[:, None], mask=live[None, :] & (m < M)[:, None], other=0.0)
        b_tile = tl.load(b + b_row[:, None] * N + n[None, :], mask=live[:, None] & (n < N)[None, :], other=0.0)
        acc = dot(a_tile, b_tile, acc, PRECISION, UPCAST)
    place = stacked_row(m, M // 2, INTERLEAVED)[:, None] * O_M + n[None, :] * O_N
    stored = (m < M)[:, None] & (n < N)[None, :]
    tl.store(out + expert.to(tl.int64) * O_E + place, acc.to(out.dtype.element_ty), mask=stored)


@triton.jit
def bias_gradient(
    a,
    weight_R,
    row_R,
    offset_E,
    out,
    N: tl.constexpr,
    K: tl.constexpr,
    GATHER: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``out[e] [N] = sum_rows weight[row] * a[row]``; a gathered operand has tokens for rows; weight None: 1."""
    COLUMNS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    expert = tl.program_id(0) // COLUMNS
    n = tl.program_id(0) % COLUMNS * BLOCK_N + tl.arange(0, BLOCK_N)
    end = tl.load(offset_E + expert + 1)
    sums = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    for start in range(tl.load(offset_E + expert), end, BLOCK_K):
        position = start + tl.arange(0, BLOCK_K)
        live = position < end
        r = tl.load(row_R + position, mask=live, other=0)
        a_row = (r // K).to(tl.int64) if GATHER else position.to(tl.int64)
        row = tl.load(a + a_row[:, None] * N + n[None, :], mask=live[:, None] & (n < N)[None, :], other=0.0)
        row = row.to(tl.float32)
        if weight_R is not None:
            row *= tl.load(weight_R + r, mask=live, other=0.0).to(tl.float32)[:, None]
        sums += row
    place = out + expert * N + stacked_row(n, N // 2, INTERLEAVED)
    tl.store(place, tl.sum(sums, 0).to(out.dtype.element_ty), mask=n < N)
