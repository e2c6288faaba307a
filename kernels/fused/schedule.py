"""Shape -> tiles -> launches: pure, cached, testable without a GPU and without Triton.

``tiles``     the block sizes for a problem on a target: a rule by rows per expert, or the tuning table (``tuning``)
``forward``   routing, up projection, down projection, combine
``backward``  stands in ``schedule_backward``

The manner is that of OpenAI's triton_kernels (shape -> flags, no autotuning at run time); the rule follows vLLM's tuned
H200 tables and reference/kernels.md 1.1, 1.2 and 3b.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace

from moepass.kernels.fused import tma
from moepass.kernels.fused.launch import (
    SCALARS,
    Activation,
    Argument,
    Buffer,
    Constant,
    Extent,
    Launch,
    Program,
    Term,
    cdiv,
    extent,
    power_of_two,
)
from moepass.kernels.fused.problem import TRITON_TYPES, Problem, Target, Tile, Tiles
from moepass.kernels.fused.tuning import tuned

#: Rows of a block in the routing kernels.
ROUTING_BLOCK = 128
#: Routed rows up to which one program does the whole routing: one launch instead of three.
ONE_PROGRAM = 1024
#: Targets whose matrix instructions read both operands from shared memory, which leaves registers for wide tiles.
WGMMA = ("sm_90", "sm_100")
#: The inputs of a forward program.
INPUTS = ("x_TD", "index_R", "weight_R", "w_in", "w_out", "b_in", "b_out")


@functools.lru_cache(maxsize=1024)
def tiles(problem: Problem, target: Target) -> Tiles:
    """Block sizes by rows per expert: BLOCK_M near them, so that little is padding; wide tiles where they are many."""
    exact = problem.dtype == "float32"  # no matrix instructions: smaller tiles, or they spill
    m = row_tile(problem.rows_per_expert, problem.dtype)
    deep = 128 if m <= 32 and not exact else 64
    warps = 4 if m <= 32 else 8
    wide = m == 128 and target.name in WGMMA
    roomy = wide and not problem.interleaved  # the places of alternating rows take the registers of wide tiles
    narrow = 64 if m <= 16 or exact else 128
    # Up has an accumulator for each projection, hidden loads the pre-activations beside its own.
    chosen = Tiles(
        up=Tile(m, 128 if roomy or (problem.n == 1 and not exact) else 64, deep, warps, 3 if roomy else 4),
        down=Tile(m, 256 if wide else narrow, deep, warps, 3 if wide else 4),
        hidden=Tile(m, 64 if m <= 32 or exact else 128, deep, warps, 3),
        dx=Tile(m, 256 if wide else narrow, deep, warps, 3 if wide else 4),
        dw=Tile(64 if exact else 128, 256 if roomy else narrow if exact else 128, 32 if m <= 32 else 64, 8, 3, 1),
    )
    rule = Tiles(*(_fit(name, tile, problem, target) for name, tile in chosen._asdict().items()))
    return tuned(problem, target.name, rule if m > 16 else _streaming(rule, problem, target))


def _streaming(chosen: Tiles, problem: Problem, target: Target) -> Tiles:
    """For decoding, where the time is that of reading weights: columns cut until every SM has some to stream.

    A tile of 16 rows holds nearly always all rows of its expert, so each active expert's weights are still read once.
    """
    active = min(problem.E, problem.tokens * problem.K)

    def cut(tile: Tile, columns: int) -> Tile:
        n = tile.n
        while n > 16 and active * cdiv(columns, n) < target.sms:
            n //= 2
        return tile._replace(n=n)

    return chosen._replace(up=cut(chosen.up, problem.F), down=cut(chosen.down, problem.D))


def row_tile(rows: float, dtype: str) -> int:
    """BLOCK_M for that many rows per expert."""
    largest = 64 if dtype == "float32" else 128
    return next(m for m in (16, 32, 64, 128) if rows <= m or m == largest)


def _fit(name: str, tile: Tile, problem: Problem, target: Target) -> Tile:
    """No larger than the matrices, and with as many stages as shared memory holds."""
    columns, depth = {
        "up": (problem.F, problem.D),
        "down": (problem.D, problem.F),
        "hidden": (problem.F, problem.D),
        "dx": (problem.D, problem.F),
        "dw": (max(problem.D, problem.F), max(32, problem.tokens)),  # 16 spills on sm_80
    }[name]
    n, k = min(tile.n, block_of(columns)), min(tile.k * 2 // problem.itemsize, block_of(depth))
    m = min(tile.m, block_of(max(problem.D, problem.F))) if name == "dw" else tile.m
    operands = (problem.n if name == "up" else 1) * n + m
    stages = min(tile.stages, max(1, target.shared // (operands * k * problem.itemsize)))
    stages = min(stages, 2) if target.warp == 64 else stages
    return tile._replace(m=m, n=n, k=k, stages=stages)


def block_of(size: int) -> int:
    """The power of two at or above ``size``, at least 16: what ``tl.dot`` takes."""
    return max(16, power_of_two(size))


@functools.lru_cache(maxsize=1024)
def forward(problem: Problem, tiles: Tiles, target: Target) -> Program:
    """``y [T, D]`` and, if saved, ``z [R, n*F]``."""
    step, rows = Step(problem, target), "sy_RD" if tiles.down.weigh else "y_RD"
    launches = (
        *routing(step, problem.tokens * problem.K, tiles.up.m),
        up(step, tiles.up, save=problem.save, hidden=True),
        down(step, tiles.down),
        combine(step, "combine", rows, None if tiles.down.weigh else "weight_R", "y_TD"),
    )
    saved = (Buffer("z_RN", problem.dtype, (R, extent(problem.n * problem.F))),) if problem.save else ()
    buffers = (
        *routing_buffers(problem, launches),
        *saved,
        Buffer("h_RF", problem.dtype, (R, extent(problem.F))),
        Buffer(rows, problem.dtype, (R, extent(problem.D))),
        Buffer("y_TD", problem.dtype, (T, extent(problem.D))),
    )
    results = ("y_TD", "z_RN") if problem.save else ("y_TD",)
    return Program(INPUTS, buffers, launches, results, tiles.up.m, problem.E, problem.K)


T, R, TILES = extent("T"), extent("R"), extent("TILES")


class Step:
    """Makes the launches of one problem: types of its buffers, and the constants that all GEMMs share."""

    def __init__(self, problem: Problem, target: Target) -> None:
        self.problem, self.target = problem, target

    @property
    def math(self) -> dict[str, Constant]:
        """How products are taken: float32 exactly; the interpreter has no arithmetic for bfloat16."""
        upcast = self.target.interpreter and self.problem.dtype == "bfloat16"
        return {"PRECISION": "ieee", "UPCAST": upcast}

    @property
    def w_in(self) -> dict[str, Constant]:
        """Strides of ``w_in``."""
        return dict(zip(("W_E", "W_N", "W_D"), self.problem.w_in, strict=True))

    @property
    def w_out(self) -> dict[str, Constant]:
        """Strides of ``w_out``."""
        return dict(zip(("W_E", "W_D", "W_F"), self.problem.w_out, strict=True))

    def type_of(self, name: str) -> str:
        """Triton's signature string of a buffer or scalar."""
        if name in SCALARS:
            return "i32"
        dtype = self.problem.dtype
        if name == "index_R":
            dtype = self.problem.index_dtype
        elif name in ("weight_R", "dweight_R"):
            dtype = self.problem.weight_dtype
        elif name in INTEGERS:
            dtype = "int32"
        elif name in WIDE:
            dtype = "float32"
        return "*" + TRITON_TYPES[dtype]

    def launch(
        self,
        name: str,
        kernel: str,
        bindings: Mapping[str, str | None],
        constants: Mapping[str, Constant],
        grid: Extent,
        tile: Tile | None = None,
        warps: int = 4,
    ) -> Launch:
        """``bindings``: parameter -> buffer or scalar, or None where the kernel shall do without it."""
        arguments = tuple(Argument(p, b, self.type_of(b)) for p, b in bindings.items() if b is not None)
        absent: dict[str, Constant] = {p: None for p, b in bindings.items() if b is None}
        blocks: dict[str, Constant] = {}
        if tile is not None:
            blocks = {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k}
        constexprs = tuple((absent | dict(constants) | blocks).items())
        warps, stages = (warps, 1) if tile is None else (tile.warps, tile.stages)
        return Launch(name, kernel, arguments, constexprs, grid, warps, stages)

    def over_tiles(
        self,
        which: str,
        name: str,
        kernel: str,
        bindings: Mapping[str, str | None],
        constants: Mapping[str, Constant],
        columns: int,
        tile: Tile,
    ) -> Launch:
        """The launch of ``which`` GEMM of ``Tiles`` over M-tiles and ``columns`` columns, in the form of its tile.

        A switch that is off is not given: the kernels default to a program per tile, and to pointers.
        """
        grid, switches, E = extent("TILES", 1, cdiv(columns, tile.n)), dict[str, Constant](), self.problem.E
        if tile.persistent:
            switches |= {"PERSISTENT": True, "E": E, "BINS": block_of(E)}
            grid = replace(grid, most=tile.persistent * self.target.sms)
        if level := tma.level(which, tile.tma, self.problem, self.target):
            switches |= {"TMA": level, "E": E}
        return self.launch(name, kernel, bindings, {**constants, **switches}, grid, tile)


#: Buffers of positions and counts, and those that are float32 whatever x is.
INTEGERS = ("count_EB", "count_E", "row_R", "position_R", "offset_E", "tile_expert", "tile_row")
WIDE = ("partial_RP", "z_SRN", "y_SRD")


def same(*names: str) -> dict[str, str | None]:
    """Parameters bound to the buffers of their own names."""
    return {name: name for name in names}


def routing(step: Step, rows: int, block_m: int) -> tuple[Launch, ...]:
    """One launch for few rows (``rows``, of the T that the tiles are for), three for many."""
    E, BLOCK = step.problem.E, ROUTING_BLOCK
    bins = max(64, 1 << E.bit_length())  # a power of two above E: one more bin, for rows without an expert
    constants: dict[str, Constant] = {"E": E, "BINS": bins, "BLOCK": BLOCK}
    maps = same("row_R", "position_R", "offset_E", "tile_expert", "tile_row", "R", "TILES")
    if rows <= ONE_PROGRAM:
        constants["BLOCK_M"] = block_m
        return (step.launch("route", "routing.route", same("index_R") | maps, constants, extent(1), warps=8),)
    blocks = extent("R", BLOCK)
    count = step.launch("count", "routing.count", same("index_R", "count_EB", "R"), constants, blocks)
    sums: dict[str, Constant] = {"BLOCK": BLOCK, "CHUNK": 1024}
    scan = step.launch("scan", "routing.scan", same("count_EB", "count_E", "R"), sums, extent(E))
    place = step.launch(
        "place",
        "routing.place",
        same("index_R", "count_EB", "count_E") | maps,
        constants | {"BLOCK_M": block_m},
        Extent((*blocks.terms, Term("TILES", BLOCK))),
        warps=8,
    )
    return count, scan, place


def routing_buffers(problem: Problem, launches: tuple[Launch, ...]) -> tuple[Buffer, ...]:
    """What the routing launches write."""
    E = problem.E
    maps = (
        Buffer("row_R", "int32", (R,)),
        Buffer("position_R", "int32", (R,)),
        Buffer("offset_E", "int32", (extent(E + 1),)),
        Buffer("tile_expert", "int32", (TILES,)),
        Buffer("tile_row", "int32", (TILES,)),
    )
    if launches[0].name == "route":
        return maps
    blocks = extent("R", ROUTING_BLOCK)
    return (Buffer("count_EB", "int32", (extent(E), blocks)), Buffer("count_E", "int32", (extent(E),)), *maps)


def up(step: Step, tile: Tile, *, save: bool, hidden: bool) -> Launch:
    """Pre-activations and hidden rows, either of which may be left out."""
    p = step.problem
    bindings = same("x_TD", "w_in") | {"b_in": "b_in" if p.bias_in else None}
    bindings |= same("row_R", "offset_E", "tile_expert", "tile_row")
    bindings |= {"z_RN": "z_RN" if save else None, "h_RF": "h_RF" if hidden else None, "TILES": "TILES"}
    constants: dict[str, Constant] = {
        "VALUE": Activation(p.activation, "value"),
        "D": p.D,
        "F": p.F,
        "K": p.K,
        "N": p.n,
        "INTERLEAVED": p.interleaved,
        **step.w_in,
        **step.math,
        "GROUP": tile.group,
    }
    return step.over_tiles("up", "up", "up.up_projection", bindings, constants, p.F, tile)


def down(step: Step, tile: Tile) -> Launch:
    """Output rows in expert order, ``sy_RD`` where they are weighted."""
    p = step.problem
    bindings = same("h_RF", "w_out") | {"b_out": "b_out" if p.bias_out else None}
    bindings |= same("offset_E", "tile_expert", "tile_row") | {"y_RD": "sy_RD" if tile.weigh else "y_RD"}
    bindings |= same("TILES", "weight_R", "row_R") if tile.weigh else same("TILES")
    constants: dict[str, Constant] = {"D": p.D, "F": p.F, **step.w_out, **step.math, "GROUP": tile.group}
    return step.over_tiles("down", "down", "down.down_projection", bindings, constants, p.D, tile)


def combine(step: Step, name: str, rows: str, weight: str | None, out: str) -> Launch:
    """Gather-and-sum per token, weighted or not."""
    p = step.problem
    width = min(256, block_of(p.D))
    block_t = 4 if p.tokens >= 512 or step.target.interpreter else 1
    bindings: dict[str, str | None] = {"y_RD": rows, "weight_R": weight, "position_R": "position_R"}
    bindings |= {"out_TD": out, "T": "T"}
    constants: dict[str, Constant] = {"D": p.D, "K": p.K, "BLOCK_T": block_t, "BLOCK_D": width}
    return step.launch(name, "combine.combine", bindings, constants, extent("T", block_t, cdiv(p.D, width)))
