"""The launches for a few tokens: each active expert's weights streamed once, without tiles (``decode``).

When: T <= 4 and no pre-activations to keep.  Up to there a tile of 16 rows is padding for the most part, and a routing
launch, of the four that the tiles need, costs as much as 6 MB of weights; multiplying on vector units is hidden behind
the stream: a weight costs a conversion and a product for each of its expert's rows, 5 operations of 128 lanes at
10 weights a cycle on an H200's SM, 4.3 TB/s being 10 bfloat16 weights a cycle and SM.  Beyond, matrix units are needed.
Source: reference/kernels.md 2.1 (copy-free gemv) and 2.4 (T = 1..4: gemv or 16-row tiles, by launches).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from moepass.kernels.fused.launch import Activation, Buffer, Constant, Launch, Program, cdiv, extent, power_of_two
from moepass.kernels.fused.problem import Problem, Target
from moepass.kernels.fused.schedule import INPUTS, R, Step, T, same

#: Most tokens whose weights are streamed; most rows of an expert that are held at once, where a caller asks for more.
MOST_TOKENS, MOST_ROWS = 4, 8
#: Programs that every SM is to have, for as many reads in flight; at most so many parts of a contraction.
PROGRAMS, MOST_PARTS = 2, 8
#: Weights that a program multiplies at a time, by rows: every row's sums take registers.
ELEMENTS = {1: 4096, 2: 2048, 4: 2048, 8: 1024}
#: Of them along the axis on which weights lie in memory, one after the other.
ALONG, ACROSS = 512, 64


class Stream(NamedTuple):
    """How one matrix is read: ``n`` columns of the result by ``k`` of the contraction, which is cut into parts.

    ``rows``  of an expert at once;  ``part``: the length of a part, a multiple of ``k``
    """

    rows: int
    n: int
    k: int
    splits: int
    part: int


def streams(problem: Problem) -> bool:
    """Whether the forward pass streams weights; a pass that keeps pre-activations has the tiles' expert order."""
    return 0 < problem.tokens <= MOST_TOKENS and not problem.save


def stream(problem: Problem, target: Target, columns: int, length: int, *, along: bool) -> Stream:
    """Blocks for a product with ``columns`` columns; ``along``: the contraction is the weights' dense axis."""
    rows = min(MOST_ROWS, power_of_two(problem.tokens))
    elements = ELEMENTS[rows]
    n = min(elements // ALONG if along else ACROSS, power_of_two(columns))
    k = min(ALONG if along else elements // n, power_of_two(length))
    active, splits = min(problem.E, problem.tokens * problem.K), 1
    while (
        splits < MOST_PARTS and active * cdiv(columns, n) * splits < PROGRAMS * target.sms and length > splits * 2 * k
    ):
        splits *= 2
    part = cdiv(cdiv(length, splits), k) * k
    return Stream(rows, n, k, cdiv(length, part), part)


@functools.lru_cache(maxsize=1024)
def forward(problem: Problem, target: Target) -> Program:
    """``y [T, D]`` in three launches, or four where the up projection is cut into parts."""
    p, step = problem, Step(problem, target)
    up = stream(p, target, p.F, p.D, along=p.w_in[2] == 1)
    if p.interleaved and up.n > 1:  # gate and up are read together
        up = up._replace(n=up.n // 2)
    down = stream(p, target, p.D, p.F, along=p.w_out[2] == 1)
    launches = (_up(step, up), *((_add_parts(step, up),) if up.splits > 1 else ()), _down(step, down), _sum(step, down))
    parts = Buffer("z_SRN", "float32", (extent(up.splits), R, extent(p.n * p.F)))
    buffers = (
        *((parts,) if up.splits > 1 else ()),
        Buffer("hidden_RF", p.dtype, (R, extent(p.F))),
        Buffer("y_SRD", "float32", (extent(down.splits), R, extent(p.D))),
        Buffer("y_TD", p.dtype, (T, extent(p.D))),
    )
    return Program(INPUTS, buffers, launches, ("y_TD",), 16, p.E, p.K)


def _blocks(step: Step, how: Stream) -> dict[str, Constant]:
    p = step.problem
    return {
        "SPLITS": how.splits,
        "PART": how.part,
        "ROWS": how.rows,
        "BLOCK": max(16, min(128, power_of_two(p.tokens * p.K))),
        "BLOCK_N": how.n,
        "BLOCK_K": how.k,
    }


def _up(step: Step, how: Stream) -> Launch:
    p, whole = step.problem, how.splits == 1
    bindings = same("x_TD", "w_in") | {"b_in": "b_in" if p.bias_in else None} | same("index_R")
    bindings |= {"z_SRN": None if whole else "z_SRN", "hidden_RF": "hidden_RF" if whole else None, "R": "R"}
    constants: dict[str, Constant] = {
        "VALUE": Activation(p.activation, "value") if whole else None,
        "D": p.D,
        "F": p.F,
        "E": p.E,
        "K": p.K,
        "N": p.n,
        "INTERLEAVED": p.interleaved,
        **step.w_in,
        **_blocks(step, how),
    }
    grid = extent("R", 1, cdiv(p.F, how.n) * how.splits)
    return step.launch("stream_up", "decode.stream_up", bindings, constants, grid)


def _add_parts(step: Step, up: Stream) -> Launch:
    p = step.problem
    width = min(128, power_of_two(p.F))
    bindings = same("z_SRN", "index_R", "hidden_RF", "R")
    constants: dict[str, Constant] = {
        "VALUE": Activation(p.activation, "value"),
        "F": p.F,
        "E": p.E,
        "N": p.n,
        "SPLITS": up.splits,
        "BLOCK_N": width,
    }
    return step.launch("add_parts", "decode.add_parts", bindings, constants, extent("R", 1, cdiv(p.F, width)))


def _down(step: Step, how: Stream) -> Launch:
    p = step.problem
    bindings = same("hidden_RF", "w_out") | {"b_out": "b_out" if p.bias_out else None} | same("index_R", "y_SRD", "R")
    constants: dict[str, Constant] = {"D": p.D, "F": p.F, "E": p.E, **step.w_out, **_blocks(step, how)}
    grid = extent("R", 1, cdiv(p.D, how.n) * how.splits)
    return step.launch("stream_down", "decode.stream_down", bindings, constants, grid)


def _sum(step: Step, down: Stream) -> Launch:
    p = step.problem
    width = min(256, power_of_two(p.D))
    bindings = same("y_SRD", "weight_R", "index_R", "y_TD", "R")
    constants: dict[str, Constant] = {"D": p.D, "E": p.E, "K": p.K, "SPLITS": down.splits, "BLOCK_D": width}
    return step.launch("gather_sum", "decode.gather_sum", bindings, constants, extent("T", 1, cdiv(p.D, width)))
