"""What the GEMM kernels share: the order of tiles, the rows of a tile, and the contraction loop.

Strides and widths are constants of the compiled kernel; offsets that can pass 2**31 elements (a row or an expert times
its stride) are taken in int64.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_at(program, tiles, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """(row tile, column tile) of a program: GROUP row tiles run over all columns before the next GROUP starts.

    Neighbours in time read the same panel of weights, which then comes from L2.
    """
    group = program // (GROUP * COLUMNS)
    first = group * GROUP
    height = tl.minimum(tiles - first, GROUP)
    inside = program % (GROUP * COLUMNS)
    return first + inside % height, inside // height


@triton.jit
def tile_count(offset_E, E: tl.constexpr, BINS: tl.constexpr, BLOCK_M: tl.constexpr):
    """M-tiles that have rows: the first of the list of tiles.  A persistent program has to know where they end."""
    e = tl.arange(0, BINS)
    rows = tl.load(offset_E + e + 1, mask=e < E, other=0) - tl.load(offset_E + e, mask=e < E, other=0)
    return tl.sum((rows + BLOCK_M - 1) // BLOCK_M, 0)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """``acc + a @ b`` in float32.  UPCAST is for the interpreter, which computes on the bits of a bfloat16."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def contract(
    acc,
    a_rows,
    w_columns,
    column_mask,
    LENGTH: tl.constexpr,
    A_STRIDE: tl.constexpr,
    W_STRIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``acc [M, N] + a [M, LENGTH] @ w [LENGTH, N]`` from pointers to each row of a and to each column of w.

    Rows are not masked: a row without a token is computed from another one's values and not stored.  The tail of the
    contraction is masked on both sides, because zero times what lies behind a buffer may be NaN.
    """
    k = tl.arange(0, BLOCK_K)
    a = a_rows[:, None] + k[None, :] * A_STRIDE
    w = w_columns[None, :] + k[:, None] * W_STRIDE
    for start in range(0, LENGTH, BLOCK_K):
        if LENGTH % BLOCK_K == 0:
            a_tile = tl.load(a)
            if EVEN_N:
                w_tile = tl.load(w)
            else:
                w_tile = tl.load(w, mask=column_mask[None, :], other=0.0)
        else:
            inside = k < LENGTH - start
            a_tile = tl.load(a, mask=inside[None, :], other=0.0)
            w_tile = tl.load(w, mask=inside[:, None] & column_mask[None, :], other=0.0)
        acc = dot(a_tile, w_tile, acc, PRECISION, UPCAST)
        a += BLOCK_K * A_STRIDE
        w += BLOCK_K * W_STRIDE
    return acc


@triton.jit
def projection_row(feature, part: tl.constexpr, F: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Row of ``w_in`` that holds feature f of the gate (part 0) or the up projection (part 1)."""
    if INTERLEAVED:
        return 2 * feature + part
    return part * F + feature


@triton.jit
def weight_descriptor(
    w,
    E: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LENGTH: tl.constexpr,
    W_E: tl.constexpr,
    W_PART: tl.constexpr,
    W_COLUMN: tl.constexpr,
    W_STRIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A TMA descriptor of each expert's ``PARTS`` matrices, contracted over LENGTH; what lies outside reads as zero."""
    return (
        tl.make_tensor_descriptor(w, [E, PARTS, COLUMNS, LENGTH], [W_E, W_PART, W_COLUMN, 1], [1, 1, BLOCK_N, BLOCK_K])
        if W_STRIDE == 1
        else tl.make_tensor_descriptor(
            w, [E, PARTS, LENGTH, COLUMNS], [W_E, W_PART, W_STRIDE, 1], [1, 1, BLOCK_K, BLOCK_N]
        )
    )


@triton.jit
def weight_tile(
    w,
    expert,
    part: tl.constexpr,
    column,
    start,
    W_STRIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``[BLOCK_K, BLOCK_N]`` of a matrix of ``weight_descriptor``."""
    return (
        tl.reshape(w.load([expert, part, column, start]), (BLOCK_N, BLOCK_K)).T
        if W_STRIDE == 1
        else tl.reshape(w.load([expert, part, start, column]), (BLOCK_K, BLOCK_N))
    )


@triton.jit
def row_descriptor(
    a,
    offset_E,
    E: tl.constexpr,
    PARTS: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A TMA descriptor of ``a [R, PARTS * LENGTH]``, part by part; rows without an expert read as zero."""
    rows = tl.maximum(tl.load(offset_E + E), 1)  # a descriptor of nothing is illegal, though nothing would be read
    return tl.make_tensor_descriptor(a, [PARTS, rows, LENGTH], [LENGTH, PARTS * LENGTH, 1], [1, BLOCK_M, BLOCK_K])


@triton.jit
def contract_described(
    acc,
    a,
    first,
    w,
    expert,
    part: tl.constexpr,
    column,
    LENGTH: tl.constexpr,
    W_STRIDE: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``contract`` with w from a descriptor; a from one too where TMA is 2, else from pointers to each row."""
    k = tl.arange(0, BLOCK_K)
    for start in range(0, LENGTH, BLOCK_K):
        if TMA == 2:
            a_tile = tl.reshape(a.load([part, first, start]), (BLOCK_M, BLOCK_K))
        elif LENGTH % BLOCK_K == 0:
            a_tile = tl.load(a[:, None] + (start + k)[None, :])
        else:
            a_tile = tl.load(a[:, None] + (start + k)[None, :], mask=(k < LENGTH - start)[None, :], other=0.0)
        w_tile = weight_tile(w, expert, part, column, start, W_STRIDE, BLOCK_N, BLOCK_K)
        acc = dot(a_tile, w_tile, acc, PRECISION, UPCAST)
    return acc
