"""The launches of the fused kernels as data: bounds, tile choice and types, without Triton and without a GPU."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from moepass.kernels.fused import schedule, schedule_decode, select, tma
from moepass.kernels.fused.launch import Extent, Term, cdiv, extent, tile_bound
from moepass.kernels.fused.problem import TARGETS, Needs, Problem, Target
from moepass.kernels.fused.schedule_backward import backward, dense_strides

QWEN3 = Problem(
    4096, 2048, 768, 128, 8, 2, "bfloat16", "silu(g)*u", w_in=(2 * 768 * 2048, 2048, 1), w_out=(2048 * 768, 768, 1)
)


@pytest.mark.parametrize("E", [1, 2, 3, 4])
@pytest.mark.parametrize("BLOCK_M", [1, 2, 4])
def test_the_bound_on_tiles_is_the_most_that_any_routing_needs(E, BLOCK_M):
    for R in range(11):
        routings = (counts for counts in itertools.product(range(R + 1), repeat=E) if sum(counts) == R)
        assert tile_bound(R, E, BLOCK_M) == max(sum(cdiv(c, BLOCK_M) for c in counts) for counts in routings)


def test_an_extent_counts_and_reads_as_python():
    both = Extent((Term("R", 128), Term("TILES", 64, 3), Term("1", 1, 5)))
    assert str(both) == "cdiv(R, 128) + cdiv(TILES, 64) * 3 + 5"
    assert both.at({"T": 1, "R": 129, "TILES": 65}) == 2 + 6 + 5
    assert extent(7).at({}) == 7


@pytest.mark.parametrize(("tokens", "rows"), [(1, 16), (256, 16), (512, 32), (1024, 64), (4096, 128), (1 << 20, 128)])
def test_row_tiles_follow_the_rows_per_expert(tokens, rows):
    chosen = schedule.tiles(replace(QWEN3, tokens=tokens), TARGETS["sm_90"])
    assert chosen.up.m == chosen.down.m == rows
    assert chosen.hidden.m == chosen.dx.m == rows


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 64, 512, 32768])
def test_operands_of_every_tile_fit_into_shared_memory(target, dtype, tokens):
    chosen = schedule.tiles(replace(QWEN3, tokens=tokens, dtype=dtype), target)
    for name, tile in chosen._asdict().items():
        operands = tile.m + tile.n * (QWEN3.n if name == "up" else 1)
        assert tile.stages * operands * tile.k * (4 if dtype == "float32" else 2) <= target.shared


def test_tiles_are_no_larger_than_small_matrices():
    small = replace(QWEN3, D=24, F=10)
    chosen = schedule.tiles(small, TARGETS["sm_90"])
    assert (chosen.up.n, chosen.up.k, chosen.down.n, chosen.down.k) == (16, 32, 32, 16)


def test_decoding_gives_every_sm_weights_to_stream():
    target = TARGETS["sm_90"]
    one = schedule.tiles(replace(QWEN3, tokens=1), target)
    assert 8 * cdiv(768, one.up.n) > target.sms > 8 * cdiv(768, 2 * one.up.n)
    assert (one.up.m, one.up.k) == (16, 128)
    assert schedule.tiles(replace(QWEN3, tokens=64), target).up.n == 64  # enough experts are active
    assert schedule.tiles(replace(QWEN3, tokens=1, F=16, w_in=(32 * 2048, 2048, 1)), target).up.n == 16


@pytest.mark.parametrize(("tokens", "names"), [(8, ["route"]), (4096, ["count", "scan", "place"])])
def test_few_rows_are_routed_in_one_launch(tokens, names):
    program = make(replace(QWEN3, tokens=tokens), TARGETS["sm_90"])
    assert [launch.name for launch in program.launches] == [*names, "up", "down", "combine"]


def test_pre_activations_are_a_buffer_only_where_they_are_saved():
    kept, dropped = (make(replace(QWEN3, save=save), TARGETS["sm_90"]) for save in (True, False))
    assert kept.results == ("y_TD", "z_RN")
    assert "z_RN" not in {b.name for b in dropped.buffers}
    up = next(launch for launch in dropped.launches if launch.name == "up")
    assert dict(up.constexprs)["z_RN"] is None
    assert up.arg_types["z_RN"] == "constexpr"
    assert up.arg_types["x_TD"] == "*bf16"
    assert up.arg_types["row_R"] == "*i32"


def test_what_a_launch_binds_is_an_input_a_buffer_or_a_scalar():
    for save, tokens in itertools.product((False, True), (1, 4096)):
        program = make(replace(QWEN3, save=save, tokens=tokens, bias_in=True, bias_out=True), TARGETS["sm_90"])
        known = {*program.inputs, *(b.name for b in program.buffers), *program.sizes(1)}
        assert {a.binding for launch in program.launches for a in launch.arguments} <= known
        assert set(program.results) <= known


def test_one_program_serves_every_number_of_tokens():
    program = make(QWEN3, TARGETS["sm_90"])
    assert program.sizes(100) == {"T": 100, "R": 800, "TILES": tile_bound(800, 128, 128)}
    up = next(launch for launch in program.launches if launch.name == "up")
    assert up.grid.at(program.sizes(100)) == tile_bound(800, 128, 128) * 768 // dict(up.constexprs)["BLOCK_N"]


@pytest.mark.parametrize("needs", [Needs(*bits) for bits in itertools.product((False, True), repeat=6)])
def test_a_backward_pass_computes_what_is_wanted_from_what_it_has(needs):
    """No launch reads what no launch before it wrote, and nothing is allocated that nobody uses."""
    for save in (False, True):
        problem, target = replace(QWEN3, save=save, bias_in=True, bias_out=True), TARGETS["sm_90"]
        program = backward(problem, schedule.tiles(problem, target), target, needs)
        names = [launch.name for launch in program.launches]
        assert len(set(names)) == len(names)
        assert len(program.results) == sum(needs)
        used = {a.binding for launch in program.launches for a in launch.arguments}
        buffers = {b.name for b in program.buffers}
        assert buffers <= used
        assert used <= {*program.inputs, *program.sizes(1), *buffers}
        assert ("up" in names) == (not save and any(needs[:5]))


def test_persistent_programs_are_a_multiple_of_the_machines_and_no_more_than_the_tiles():
    target = TARGETS["sm_90"]
    plain = schedule.tiles(QWEN3, target)
    tiles = plain._replace(up=plain.up._replace(persistent=2), hidden=plain.hidden._replace(persistent=1))
    forward = schedule.forward(QWEN3, tiles, target)
    up, down = (next(x for x in forward.launches if x.name == name) for name in ("up", "down"))
    assert up.grid.at(forward.sizes(4096)) == 2 * target.sms
    assert up.grid.at(forward.sizes(1)) == 8 * cdiv(QWEN3.F, tiles.up.n) < 2 * target.sms
    assert up.grid.at(forward.sizes(0)) == 0
    assert str(up.grid) == f"min(TILES * {cdiv(QWEN3.F, tiles.up.n)}, {2 * target.sms})"
    assert dict(up.constexprs)["PERSISTENT"] is True
    assert down in make(QWEN3, target).launches, "what is off changes no launch"
    hidden = next(x for x in backward(QWEN3, tiles, target, Needs()).launches if x.name == "hidden_gradient")
    assert hidden.grid.most == target.sms


@pytest.mark.parametrize(
    ("fields", "kernel", "said"),
    [
        ({}, "up", None),
        ({}, "dw", "gathers"),
        ({"aligned": False}, "down", "do not start at multiples of 16 bytes"),
        ({"D": 2044, "w_in": (2 * 768 * 2044, 2044, 1)}, "dx", "4088 bytes"),
        ({"w_in": (2 * 768 * 2048, 1, 2 * 768)}, "up", None),
        ({"w_in": (2 * 768 * 2048, 1, 2 * 768), "interleaved": True}, "up", "no neighbours in memory"),
        ({"interleaved": True}, "up", None),
        ({"w_out": (0, 768, 1)}, "hidden", "is 0 bytes"),
        ({"F": 772, "n": 1, "w_in": (772 * 2048, 1, 772)}, "up", "1544 bytes"),
    ],
)
def test_a_descriptor_is_refused_with_the_reason_why_it_would_be_illegal(fields, kernel, said):
    problem, target = replace(QWEN3, **fields), TARGETS["sm_90"]
    found = tma.refused(kernel, problem, target)
    assert (found is None) if said is None else said in found
    assert tma.level(kernel, tma.ROWS, problem, target) == (
        tma.NONE if said else tma.ROWS if kernel in tma.DENSE else tma.WEIGHTS
    )
    assert "no TMA" in tma.refused("up", QWEN3, TARGETS["sm_80"])


def test_descriptors_are_used_where_a_tile_asks_and_they_are_legal():
    target = TARGETS["sm_90"]
    for problem, level in ((QWEN3, 2), (replace(QWEN3, aligned=False), None), (replace(QWEN3, F=764), 1)):
        if problem.F == 764:  # rows of h are no multiple of 16 bytes; w_out lies transposed
            problem = replace(problem, w_in=(2 * 764 * 2048, 2048, 1), w_out=(2048 * 764, 1, 2048))
        tiles = schedule.tiles(problem, target)
        tiles = tiles._replace(down=tiles.down._replace(tma=2))
        down = next(x for x in schedule.forward(problem, tiles, target).launches if x.name == "down")
        assert dict(down.constexprs).get("TMA") == level
        assert down.descriptors == (level is not None)


def test_rows_are_weighed_once_by_down_or_by_combine():
    target = TARGETS["sm_90"]
    tiles = schedule.tiles(QWEN3, target)
    for weigh in (False, True):
        program = schedule.forward(QWEN3, tiles._replace(down=tiles.down._replace(weigh=weigh)), target)
        readers = [x.name for x in program.launches if "weight_R" in {a.binding for a in x.arguments}]
        assert readers == (["down"] if weigh else ["combine"])
        assert {b.name for b in program.buffers} & {"y_RD", "sy_RD"} == {"sy_RD" if weigh else "y_RD"}


def test_a_weight_gradient_is_transposed_where_the_weight_is_and_has_no_holes():
    assert dense_strides((12, 4, 1), (2, 3, 4)) == (12, 4, 1)
    assert dense_strides((12, 1, 3), (2, 3, 4)) == (12, 1, 3)
    assert dense_strides((400, 40, 1), (2, 3, 4)) == (12, 4, 1)


def make(problem: Problem, target: Target):
    return schedule.forward(problem, schedule.tiles(problem, target), target)


@pytest.mark.parametrize(("tokens", "streamed"), [(1, True), (4, True), (5, False)])
def test_weights_are_streamed_for_a_few_tokens_that_keep_nothing(tokens, streamed):
    target = TARGETS["sm_90"]
    few = replace(QWEN3, tokens=tokens)
    assert schedule_decode.streams(few) is streamed
    assert not schedule_decode.streams(replace(few, save=True))
    names = [launch.name for launch in select.forward(few, target).launches]
    assert names == (["stream_up", "stream_down", "gather_sum"] if streamed else ["route", "up", "down", "combine"])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 4, 8])
def test_parts_of_a_contraction_cover_it_once_and_keep_every_sm_busy(tokens, transposed):
    for F, K, target in itertools.product((16, 768, 1000), (1, 8), TARGETS.values()):
        few = replace(QWEN3, tokens=tokens, F=F, K=K)
        for columns, length in ((F, 2048), (2048, F)):
            how = schedule_decode.stream(few, target, columns, length, along=not transposed)
            assert (how.splits - 1) * how.part < length <= how.splits * how.part
            assert how.part % how.k == 0
            assert tokens <= how.rows <= schedule_decode.MOST_ROWS
            programs = min(tokens * K, few.E) * cdiv(columns, how.n) * how.splits
            most = how.splits * 2 > schedule_decode.MOST_PARTS or cdiv(length, 2 * how.splits) < 2 * how.k
            assert programs >= 2 * target.sms or most


def test_what_streams_bind_is_an_input_a_buffer_or_a_scalar():
    for narrow in (False, True):
        few = replace(QWEN3, tokens=1, bias_in=True, bias_out=True, K=1 if narrow else 8)
        program = schedule_decode.forward(few, TARGETS["sm_90"])
        known = {*program.inputs, *(b.name for b in program.buffers), *program.sizes(1)}
        assert {a.binding for launch in program.launches for a in launch.arguments} <= known
        assert {b.name for b in program.buffers} <= {a.binding for x in program.launches for a in x.arguments}
        assert ("add_parts" in {launch.name for launch in program.launches}) is narrow
