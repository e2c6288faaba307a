"""Routing metadata on the device: where each routed row goes, without a sort and without a host synchronisation.

A routed row r = t*K + k has the expert ``index_R[r]``; an index outside ``0..E-1`` has none.  The order is stable:
within an expert, rows stay in the order of r.  Counting is in integers, so the result does not depend on timing.

    row_R          position -> routed row, for positions below offset_E[E]
    position_R     routed row -> position; -1 without an expert
    offset_E [E+1] first position of each expert; the last is the number of rows that have one
    tile_expert    expert of each M-tile, -1 for a surplus tile;  tile_row: its first position

Two forms: ``route`` in one program, for few rows; ``count``, ``scan`` and ``place`` for many.  The number of tiles is
the bound ``launch.tile_bound``, which the host knows.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def expert_of(index_R, r, R, E: tl.constexpr):
    """Experts of routed rows; E for those without one and for r >= R."""
    e = tl.load(index_R + r, mask=r < R, other=-1)
    return tl.where((e >= 0) & (e < E), e, E).to(tl.int32)


@triton.jit
def rank(e, BLOCK: tl.constexpr):
    """How many earlier rows of the block have the same expert."""
    i = tl.arange(0, BLOCK)
    row = tl.reshape(e, (BLOCK, 1))
    column = tl.reshape(e, (1, BLOCK))
    earlier = (row == column) & (i[None, :] < i[:, None])
    return tl.sum(earlier.to(tl.int32), 1)


@triton.jit
def write_tiles(
    start, tile_expert, tile_row, count, offset, tiles, E: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Fill the map of the M-tiles ``start .. start + BLOCK`` from the experts' counts and offsets.

    A tile's expert is the number of experts whose tiles end at or before it: a running histogram of the ends.
    """
    i = tl.arange(0, BLOCK)
    tile = start + i
    height = (count + BLOCK_M - 1) // BLOCK_M
    end = tl.cumsum(height, 0)
    ends = tl.histogram(tl.minimum(tl.maximum(end - start, 0), BLOCK), 2 * BLOCK)
    e = tl.minimum(tl.gather(tl.cumsum(ends, 0), i, 0), E)  # bins behind the last expert end where it ends
    row = tl.gather(offset, e, 0) + (tile - tl.gather(end - height, e, 0)) * BLOCK_M
    tl.store(tile_expert + tile, tl.where(e < E, e, -1), mask=tile < tiles)
    tl.store(tile_row + tile, row, mask=tile < tiles)


@triton.jit(do_not_specialize=["R"])
def count(index_R, count_EB, R, E: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of each expert in each block of rows, ``[E, blocks]``."""
    block = tl.program_id(0)
    e = expert_of(index_R, block * BLOCK + tl.arange(0, BLOCK), R, E)
    bins = tl.arange(0, BINS)
    tl.store(count_EB + bins * tl.cdiv(R, BLOCK) + block, tl.histogram(e, BINS), mask=bins < E)


@triton.jit(do_not_specialize=["R"])
def scan(count_EB, count_E, R, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """One program per expert: turn its counts into those of the blocks before, in place, and give their sum."""
    e = tl.program_id(0)
    blocks = tl.cdiv(R, BLOCK)
    row = count_EB + e.to(tl.int64) * blocks
    total = tl.zeros((), tl.int32)
    for start in range(0, blocks, CHUNK):
        i = start + tl.arange(0, CHUNK)
        here = tl.load(row + i, mask=i < blocks, other=0)
        tl.store(row + i, total + tl.cumsum(here, 0) - here, mask=i < blocks)
        total += tl.sum(here, 0)
    tl.store(count_E + e, total)


@triton.jit(do_not_specialize=["R", "TILES"])
def place(
    index_R,
    count_EB,
    count_E,
    row_R,
    position_R,
    offset_E,
    tile_expert,
    tile_row,
    R,
    TILES,
    E: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Positions of a block of rows, or the map of a block of tiles: the first ``cdiv(R, BLOCK)`` programs do rows."""
    program = tl.program_id(0)
    blocks = tl.cdiv(R, BLOCK)
    bins = tl.arange(0, BINS)
    counts = tl.load(count_E + bins, mask=bins < E, other=0)
    offset = tl.cumsum(counts, 0) - counts
    if program == 0:
        tl.store(offset_E + bins, offset, mask=bins <= E)
    if program < blocks:
        r = program * BLOCK + tl.arange(0, BLOCK)
        e = expert_of(index_R, r, R, E)
        before = tl.load(count_EB + e * blocks + program, mask=e < E, other=0)
        position = tl.gather(offset, e, 0) + before + rank(e, BLOCK)
        tl.store(position_R + r, tl.where(e < E, position, -1), mask=r < R)
        tl.store(row_R + position, r, mask=e < E)
    else:
        start = (program - blocks) * BLOCK
        write_tiles(start, tile_expert, tile_row, counts, offset, TILES, E, BLOCK, BLOCK_M)


@triton.jit(do_not_specialize=["R", "TILES"])
def route(
    index_R,
    row_R,
    position_R,
    offset_E,
    tile_expert,
    tile_row,
    R,
    TILES,
    E: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """All of it in one program, for few rows."""
    bins = tl.arange(0, BINS)
    counts = tl.zeros((BINS,), tl.int32)
    for start in range(0, R, BLOCK):
        counts += tl.histogram(expert_of(index_R, start + tl.arange(0, BLOCK), R, E), BINS)
    counts = tl.where(bins < E, counts, 0)
    offset = tl.cumsum(counts, 0) - counts
    tl.store(offset_E + bins, offset, mask=bins <= E)
    taken = offset
    for start in range(0, R, BLOCK):
        r = start + tl.arange(0, BLOCK)
        e = expert_of(index_R, r, R, E)
        position = tl.gather(taken, e, 0) + rank(e, BLOCK)
        tl.store(position_R + r, tl.where(e < E, position, -1), mask=r < R)
        tl.store(row_R + position, r, mask=e < E)
        taken += tl.histogram(e, BINS)
    for start in range(0, TILES, BLOCK):
        write_tiles(start, tile_expert, tile_row, counts, offset, TILES, E, BLOCK, BLOCK_M)
