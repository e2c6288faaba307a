"""The launches of a backward pass: routing again, one pass over the hidden rows, then each gradient that is wanted.

Routing is cheap and deterministic, so it is computed again rather than kept.  What each gradient needs:

    dx        dz, then ``x_gradient`` and ``combine``
    dweight   partial sums of ``hidden_gradient``, and dy . b_out
    dw_out    s * A from ``hidden_gradient``;  dw_in, db_in: dz;  db_out: dy alone
"""

from __future__ import annotations

import functools

from moepass.kernels.fused.launch import Activation, Buffer, Constant, Extent, Launch, Program, cdiv, extent
from moepass.kernels.fused.problem import Needs, Problem, Target, Tile, Tiles
from moepass.kernels.fused.schedule import R, Step, T, block_of, combine, routing, routing_buffers, same, up

#: Rows of a block in the kernels that sum.
SUM_BLOCK = 16
#: Elements of a tile per thread beyond which the epilogue of ``hidden_gradient`` runs in halves.
CROWDED = 16


@functools.lru_cache(maxsize=1024)
def backward(problem: Problem, tiles: Tiles, target: Target, needs: Needs) -> Program:
    """The gradients in ``needs``, in its order; a program without launches where none is needed."""
    step = Step(problem, target)
    hidden = needs.x or needs.weight or needs.w_in or needs.w_out or needs.b_in
    launches = routing(step, problem.tokens * problem.K, tiles.hidden.m)
    if hidden and not problem.save:
        launches += (up(step, tiles.up._replace(m=tiles.hidden.m), save=True, hidden=False),)
    if hidden:
        launches += (hidden_gradient(step, tiles.hidden, needs),)
    if needs.weight:
        launches += (routing_gradient(step, tiles.hidden),)
    if needs.x:
        launches += (x_gradient(step, tiles.dx), combine(step, "combine_dx", "dx_RD", None, "dx_TD"))
    launches += weight_gradients(step, tiles.dw, needs)
    inputs = ("dy_TD", "x_TD", "index_R", "weight_R", "w_in", "w_out", "b_in", "b_out")
    return Program(
        (*inputs, "z_RN") if problem.save else inputs,
        (*routing_buffers(problem, launches), *hidden_buffers(problem, tiles, needs), *results(problem, needs)),
        launches,
        tuple(b.name for b in results(problem, needs)),
        tiles.hidden.m,
        problem.E,
        problem.K,
    )


def results(p: Problem, needs: Needs) -> tuple[Buffer, ...]:
    """The gradients that are wanted; those of the weights lie in memory as the weights do."""
    rows = p.n * p.F
    every = (
        Buffer("dx_TD", p.dtype, (T, extent(p.D))),
        Buffer("dweight_R", p.weight_dtype, (R,)),
        Buffer("dw_in", p.dtype, _fixed(p.E, rows, p.D), dense_strides(p.w_in, (p.E, rows, p.D))),
        Buffer("dw_out", p.dtype, _fixed(p.E, p.D, p.F), dense_strides(p.w_out, (p.E, p.D, p.F))),
        Buffer("db_in", p.dtype, _fixed(p.E, rows)),
        Buffer("db_out", p.dtype, _fixed(p.E, p.D)),
    )
    return tuple(buffer for buffer, wanted in zip(every, needs, strict=True) if wanted)


def dense_strides(strides: tuple[int, ...], shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Strides of a gradient of that shape: matrices transposed where the weight's are, without holes."""
    _, rows, columns = shape
    if strides[2] != 1 and strides[1] == 1:
        return (rows * columns, 1, rows)
    return (rows * columns, columns, 1)


def _fixed(*shape: int) -> tuple[Extent, ...]:
    return tuple(extent(size) for size in shape)


def hidden_buffers(p: Problem, tiles: Tiles, needs: Needs) -> tuple[Buffer, ...]:
    """What the steps hand to each other."""
    dz = needs.x or needs.w_in or needs.b_in
    wide = (R, extent(p.n * p.F))
    wanted = (
        (not p.save and (dz or needs.weight or needs.w_out), Buffer("z_RN", p.dtype, wide)),
        (dz, Buffer("dz_RN", p.dtype, wide)),
        (needs.w_out, Buffer("sh_RF", p.dtype, (R, extent(p.F)))),
        (needs.weight, Buffer("partial_RP", "float32", (R, extent(cdiv(p.F, tiles.hidden.n))))),
        (needs.x, Buffer("dx_RD", p.dtype, (R, extent(p.D)))),
    )
    return tuple(buffer for is_wanted, buffer in wanted if is_wanted)


def hidden_gradient(step: Step, tile: Tile, needs: Needs) -> Launch:
    """dz, s * A and the partial sums of ds, as far as they are wanted."""
    p = step.problem
    bindings = same("dy_TD", "w_out", "z_RN", "weight_R", "row_R", "offset_E", "tile_expert", "tile_row")
    bindings |= {
        "dz_RN": "dz_RN" if needs.x or needs.w_in or needs.b_in else None,
        "sh_RF": "sh_RF" if needs.w_out else None,
        "partial_RP": "partial_RP" if needs.weight else None,
        "TILES": "TILES",
    }
    constants: dict[str, Constant] = {
        "VALUE": Activation(p.activation, "value"),
        "GRAD": Activation(p.activation, "grad"),
        "D": p.D,
        "F": p.F,
        "K": p.K,
        "N": p.n,
        **step.w_out,
        "HALVES": tile.m * tile.n > CROWDED * 32 * tile.warps,
        "GROUP": tile.group,
        **step.math,
    }
    return step.over_tiles("hidden", "hidden_gradient", "backward.hidden_gradient", bindings, constants, p.F, tile)


def routing_gradient(step: Step, hidden: Tile) -> Launch:
    """The gradient of the routing weights."""
    p = step.problem
    parts = cdiv(p.F, hidden.n)
    bindings = same("partial_RP", "dy_TD") | {"b_out": "b_out" if p.bias_out else None}
    bindings |= same("index_R", "position_R", "dweight_R", "R")
    constants: dict[str, Constant] = {
        "D": p.D,
        "K": p.K,
        "PARTS": parts,
        "BLOCK": SUM_BLOCK,
        "BLOCK_P": min(32, block_of(parts)),
        "BLOCK_D": min(128, block_of(p.D)),
    }
    return step.launch("routing_gradient", "backward.routing_gradient", bindings, constants, extent("R", SUM_BLOCK))


def x_gradient(step: Step, tile: Tile) -> Launch:
    """The gradient of each routed row's token, in expert order."""
    p = step.problem
    bindings = same("dz_RN", "w_in", "offset_E", "tile_expert", "tile_row", "dx_RD", "TILES")
    constants: dict[str, Constant] = {
        "D": p.D,
        "F": p.F,
        "N": p.n,
        "INTERLEAVED": p.interleaved,
        **step.w_in,
        "GROUP": tile.group,
        **step.math,
    }
    return step.over_tiles("dx", "x_gradient", "backward.x_gradient", bindings, constants, p.D, tile)


def weight_gradients(step: Step, tile: Tile, needs: Needs) -> tuple[Launch, ...]:
    """Products and sums over each expert's rows."""
    p = step.problem
    launches: tuple[Launch, ...] = ()
    if needs.w_in:
        launches += (_outer(step, tile, "dw_in", "dz_RN", "x_TD", gather_a=False),)
    if needs.w_out:
        launches += (_outer(step, tile, "dw_out", "dy_TD", "sh_RF", gather_a=True),)
    if needs.b_in:
        launches += (_bias(step, "db_in", "dz_RN", None, p.n * p.F),)
    if needs.b_out:
        launches += (_bias(step, "db_out", "dy_TD", "weight_R", p.D),)
    return launches


def _outer(step: Step, tile: Tile, out: str, a: str, b: str, *, gather_a: bool) -> Launch:
    p = step.problem
    M, N = (p.D, p.F) if gather_a else (p.n * p.F, p.D)
    strides = dense_strides(p.w_out if gather_a else p.w_in, (p.E, M, N))
    bindings: dict[str, str | None] = {"a": a, "b": b, "row_R": "row_R", "offset_E": "offset_E", "out": out}
    constants: dict[str, Constant] = {
        "M": M,
        "N": N,
        "K": p.K,
        "GATHER_A": gather_a,
        "GATHER_B": not gather_a,
        "INTERLEAVED": p.interleaved and p.n == 2 and not gather_a,
        **dict(zip(("O_E", "O_M", "O_N"), strides, strict=True)),
        **step.math,
    }
    grid = extent(p.E * cdiv(M, tile.m) * cdiv(N, tile.n))
    return step.launch(out, "weights.outer_gradient", bindings, constants, grid, tile)


def _bias(step: Step, out: str, a: str, weight: str | None, N: int) -> Launch:
    p = step.problem
    width = min(64, block_of(N))
    gathered = weight is not None
    bindings: dict[str, str | None] = {"a": a, "weight_R": weight, "row_R": "row_R", "offset_E": "offset_E", "out": out}
    constants: dict[str, Constant] = {
        "N": N,
        "K": p.K,
        "GATHER": gathered,
        "INTERLEAVED": p.interleaved and p.n == 2 and not gathered,
        "BLOCK_N": width,
        "BLOCK_K": SUM_BLOCK,
    }
    return step.launch(out, "weights.bias_gradient", bindings, constants, extent(p.E * cdiv(N, width)))
