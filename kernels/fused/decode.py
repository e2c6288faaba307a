"""Decoding: a few tokens, so that reading weights is all the time.  No tiles, no routing launch, no padded rows.

The programs of a routed row r belong to its expert if r is the expert's first row; the other rows' programs leave at
once.  A program multiplies some rows of its expert's matrix by up to ROWS of the expert's tokens and sums, on vector
units: each active expert's weights are read once where no expert has more than ROWS rows, which T <= ROWS ensures.

    hidden_RF  [R, F]     activated rows, at their routed row (not in expert order)
    z_SRN, y_SRD          float32 sums over each of S parts of the contraction (split-K), so that every SM has a part;
                          ``add_parts`` and ``gather_sum`` add them in the order of S: no atomics

Rows without an expert are neither read nor written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moepass.kernels.fused.blocks import projection_row
from moepass.kernels.fused.routing import expert_of


@triton.jit
def expert_at(index_R, r, E: tl.constexpr):
    """The expert of one routed row; E for a row without one."""
    e = tl.load(index_R + r)
    return tl.where((e >= 0) & (e < E), e, E).to(tl.int32)


@triton.jit
def share(index_R, expert, R, E: tl.constexpr, BLOCK: tl.constexpr):
    """An expert's first routed row, and how many it has."""
    leader = tl.zeros((), tl.int32) + R
    count = tl.zeros((), tl.int32)
    for start in range(0, R, BLOCK):
        r = start + tl.arange(0, BLOCK)
        mine = expert_of(index_R, r, R, E) == expert
        leader = tl.minimum(leader, tl.min(tl.where(mine, r, R), 0))
        count += tl.sum(mine.to(tl.int32), 0)
    return leader, count


@triton.jit
def rows_of(index_R, expert, first, R, E: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """ROWS routed rows of an expert, from its ``first`` on; -1 behind the last."""
    rank = first + tl.arange(0, ROWS)
    rows = tl.full((ROWS,), -1, tl.int32)
    before = tl.zeros((), tl.int32)
    for start in range(0, R, BLOCK):
        r = start + tl.arange(0, BLOCK)
        mine = expert_of(index_R, r, R, E) == expert
        place = before + tl.cumsum(mine.to(tl.int32), 0) - 1
        found = mine[None, :] & (place[None, :] == rank[:, None])
        rows = tl.maximum(rows, tl.max(tl.where(found, r[None, :], -1), 1))
        before += tl.sum(mine.to(tl.int32), 0)
    return rows


@triton.jit
def stream(
    a_rows,
    w_columns,
    wanted,
    begin,
    LENGTH: tl.constexpr,
    PART: tl.constexpr,
    W_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
):
    """``a [ROWS, PART] @ w [PART, BLOCK_N]`` in float32 from ``begin`` on, both cut off at LENGTH.

    Products are summed elementwise and across threads once at the end.  One row needs no third dimension.
    """
    k = begin + tl.arange(0, BLOCK_K)
    if ROWS == 1:
        sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    else:
        sums = tl.zeros((ROWS, BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, PART, BLOCK_K):
        at = k + start
        if EVEN:
            w = tl.load(w_columns[:, None] + at[None, :] * W_STRIDE).to(tl.float32)
            a = tl.load(a_rows[:, None] + at[None, :]).to(tl.float32)
        else:
            inside = at < LENGTH
            w_mask = wanted[:, None] & inside[None, :]
            w = tl.load(w_columns[:, None] + at[None, :] * W_STRIDE, mask=w_mask, other=0.0).to(tl.float32)
            a = tl.load(a_rows[:, None] + at[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
        if ROWS == 1:
            sums += a * w
        else:
            sums += a[:, None, :] * w[None, :, :]
    if ROWS == 1:
        total = tl.sum(sums, 1)[None, :]
    else:
        total = tl.sum(sums, 2)
    return total


@triton.jit(do_not_specialize=["R"])
def stream_up(
    x_TD,
    w_in,
    b_in,
    index_R,
    z_SRN,
    hidden_RF,
    R,
    VALUE: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    W_E: tl.constexpr,
    W_N: tl.constexpr,
    W_D: tl.constexpr,
    SPLITS: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``program(x @ w_in[expert].T + b_in[expert])`` for BLOCK_N features; in parts, the first one with the bias: z."""
    COLUMNS: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    EVEN: tl.constexpr = F % BLOCK_N == 0 and D == SPLITS * PART
    r = tl.program_id(0) // (COLUMNS * SPLITS)
    expert = expert_at(index_R, r, E)
    leader, count = share(index_R, expert, R, E, BLOCK)
    if (expert == E) | (leader != r):
        return
    feature = tl.program_id(0) % COLUMNS * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(0) // COLUMNS % SPLITS
    wanted = feature < F
    weights = w_in + expert.to(tl.int64) * W_E
    for first in range(0, count, ROWS):
        rows = rows_of(index_R, expert, first, R, E, ROWS, BLOCK)
        x = x_TD + (tl.maximum(rows, 0) // K).to(tl.int64) * D
        begin = part * PART
        if N == 2 and INTERLEAVED:  # neighbours in memory: read together
            both = tl.program_id(0) % COLUMNS * (2 * BLOCK_N) + tl.arange(0, 2 * BLOCK_N)
            w = weights + both * W_N
            z = stream(x, w, both < 2 * F, begin, D, PART, W_D, ROWS, 2 * BLOCK_N, BLOCK_K, EVEN)
            g, u = tl.split(tl.reshape(z, (ROWS, BLOCK_N, 2)))
        else:
            g = stream(x, weights + feature * W_N, wanted, begin, D, PART, W_D, ROWS, BLOCK_N, BLOCK_K, EVEN)
            if N == 2:
                w = weights + (F + feature) * W_N
                u = stream(x, w, wanted, begin, D, PART, W_D, ROWS, BLOCK_N, BLOCK_K, EVEN)
        stored = (rows >= 0)[:, None] & wanted[None, :]
        if b_in is not None:
            bias = tl.load(b_in + expert * (N * F) + projection_row(feature, 0, F, INTERLEAVED), mask=wanted, other=0.0)
            g += tl.where(part == 0, bias.to(tl.float32), 0.0)[None, :]
            if N == 2:
                row = projection_row(feature, 1, F, INTERLEAVED)
                bias = tl.load(b_in + expert * (N * F) + row, mask=wanted, other=0.0)
                u += tl.where(part == 0, bias.to(tl.float32), 0.0)[None, :]
        if z_SRN is not None:
            out = z_SRN + (part * R + rows).to(tl.int64)[:, None] * (N * F) + feature[None, :]
            tl.store(out, g, mask=stored)
            if N == 2:
                tl.store(out + F, u, mask=stored)
        if hidden_RF is not None:
            if N == 2:
                h = VALUE(g, u)
            else:
                h = VALUE(g, g)
            out = hidden_RF + rows.to(tl.int64)[:, None] * F + feature[None, :]
            tl.store(out, h.to(hidden_RF.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["R"])
def add_parts(
    z_SRN,
    index_R,
    hidden_RF,
    R,
    VALUE: tl.constexpr,
    F: tl.constexpr,
    E: tl.constexpr,
    N: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The parts of one routed row's pre-activations added up and activated."""
    COLUMNS: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    r = tl.program_id(0) // COLUMNS
    if expert_at(index_R, r, E) == E:
        return
    feature = tl.program_id(0) % COLUMNS * BLOCK_N + tl.arange(0, BLOCK_N)
    wanted = feature < F
    g = tl.zeros((BLOCK_N,), tl.float32)
    u = tl.zeros((BLOCK_N,), tl.float32)
    for part in tl.static_range(SPLITS):
        z = z_SRN + (part * R + r).to(tl.int64) * (N * F) + feature
        g += tl.load(z, mask=wanted, other=0.0)
        if N == 2:
            u += tl.load(z + F, mask=wanted, other=0.0)
    if N == 2:
        h = VALUE(g, u)
    else:
        h = VALUE(g, g)
    tl.store(hidden_RF + r.to(tl.int64) * F + feature, h.to(hidden_RF.dtype.element_ty), mask=wanted)


@triton.jit(do_not_specialize=["R"])
def stream_down(
    hidden_RF,
    w_out,
    b_out,
    index_R,
    y_SRD,
    R,
    D: tl.constexpr,
    F: tl.constexpr,
    E: tl.constexpr,
    W_E: tl.constexpr,
    W_D: tl.constexpr,
    W_F: tl.constexpr,
    SPLITS: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``hidden @ w_out[expert].T`` for BLOCK_N of the D columns, in parts; the first one has the bias."""
    COLUMNS: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    EVEN: tl.constexpr = D % BLOCK_N == 0 and F == SPLITS * PART
    r = tl.program_id(0) // (COLUMNS * SPLITS)
    expert = expert_at(index_R, r, E)
    leader, count = share(index_R, expert, R, E, BLOCK)
    if (expert == E) | (leader != r):
        return
    d = tl.program_id(0) % COLUMNS * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(0) // COLUMNS % SPLITS
    wanted = d < D
    w = w_out + expert.to(tl.int64) * W_E + d * W_D
    for first in range(0, count, ROWS):
        rows = rows_of(index_R, expert, first, R, E, ROWS, BLOCK)
        hidden = hidden_RF + tl.maximum(rows, 0).to(tl.int64) * F
        y = stream(hidden, w, wanted, part * PART, F, PART, W_F, ROWS, BLOCK_N, BLOCK_K, EVEN)
        if b_out is not None:
            bias = tl.load(b_out + expert * D + d, mask=wanted, other=0.0).to(tl.float32)
            y += tl.where(part == 0, bias, 0.0)[None, :]
        out = y_SRD + (part * R + rows).to(tl.int64)[:, None] * D + d[None, :]
        tl.store(out, y, mask=(rows >= 0)[:, None] & wanted[None, :])


@triton.jit(do_not_specialize=["R"])
def gather_sum(
    y_SRD,
    weight_R,
    index_R,
    y_TD,
    R,
    D: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``y[t] = sum_k weight[t, k] * sum_s y_SRD[s, t*K + k]``, in that order."""
    COLUMNS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    t = tl.program_id(0) // COLUMNS
    d = tl.program_id(0) % COLUMNS * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for k in range(K):
        r = t * K + k
        if expert_at(index_R, r, E) < E:
            row = tl.zeros((BLOCK_D,), tl.float32)
            for part in tl.static_range(SPLITS):
                row += tl.load(y_SRD + (part * R + r).to(tl.int64) * D + d, mask=d < D, other=0.0)
            total += tl.load(weight_R + r).to(tl.float32) * row
    tl.store(y_TD + t.to(tl.int64) * D + d, total.to(y_TD.dtype.element_ty), mask=d < D)
