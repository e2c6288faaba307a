"""``benchmarks.gpu_moe`` without an accelerator: its sides are right, a wrong one is caught, its arithmetic known."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_moe
from benchmarks.gpu import cells, chart, check, fit, sides, tune
from moepass.kernels.fused import schedule
from moepass.kernels.fused.problem import TARGETS, Tile, Tiles
from moepass.lowering.hardware import Hardware
from moepass.lowering.registry import lowerings

SHAPE = cells.SMALL[0]


@pytest.fixture(scope="module")
def bench() -> sides.Bench:
    return sides.make(SHAPE, *cells.weights(SHAPE, torch.float32, "cpu"), None)


EAGER = ["dense", "gathered", "grouped", "HF grouped_mm, eager", "HF loop, eager", "permute + F.grouped_mm"]


@pytest.mark.parametrize("routing", ["random", "skewed"])
@pytest.mark.parametrize("name", EAGER)
def test_every_eager_side_computes_the_reference_and_its_gradients(bench, name, routing):
    cell = cells.Cell(SHAPE, 33, True, routing)
    errors = check.relative_errors(bench, bench.sides[name], cell, check.exact(cell, torch.float32, "cpu"))
    assert set(errors) == {"y", "x", "score", "w_in", "w_out"}
    assert max(errors.values()) < 1e-6


def test_a_side_with_swapped_halves_is_caught(bench):
    swapped = torch.cat([bench.w_in[:, SHAPE.F :], bench.w_in[:, : SHAPE.F]], 1)
    wrong = sides.make(SHAPE, swapped.detach(), bench.w_out.detach(), None)
    cell = cells.Cell(SHAPE, 33, False, "random")
    errors = check.relative_errors(wrong, wrong.sides["grouped"], cell, check.exact(cell, torch.float32, "cpu"))
    assert errors["y"] > check.TOLERANCE[torch.bfloat16]


def test_work_and_traffic_by_hand():
    cell = cells.Cell(cells.Shape("hand", D=4, F=3, E=5, K=2), tokens=7, train=False, routing="random")
    assert cell.flops == 2 * (3 * 4 * 3) * 7 * 2
    assert cell.floor_bytes(active=3, itemsize=2) == (3 * 36 + 2 * 7 * 4) * 2
    train = replace(cell, train=True)
    assert train.flops == 3 * cell.flops
    assert train.floor_bytes(active=3, itemsize=2) == (2 * 3 * 36 + 5 * 36 + 6 * 7 * 4) * 2


def test_skewed_routing_prefers_the_first_experts_and_repeats_none():
    shape = replace(SHAPE, E=16, K=4)
    index = {}
    for routing in ("random", "skewed"):
        cell = cells.Cell(shape, 512, False, routing)
        _, score_TE = cells.tokens_and_scores(cell, torch.float32, "cpu")
        index[routing], weight_TK = cells.route(score_TE, shape.K)
        assert torch.allclose(weight_TK.sum(-1), torch.ones(512))
        assert (index[routing].sort(-1).values.diff(dim=-1) > 0).all()
    heaviest = {routing: int(i.flatten().bincount(minlength=16).max()) for routing, i in index.items()}
    assert heaviest["skewed"] > 2 * heaviest["random"]


def test_verdicts_name_ratios_and_regret():
    cell = cells.Cell(SHAPE, 64, False, "random")
    seconds = {sides.OURS: 2e-3, "dense": 1e-3, "grouped": 3e-3, "HF loop, eager": 6e-3, sides.STREAMED: 1e-4}
    row = {"seconds": seconds, "chosen": "grouped", "active experts": 8}
    judged = gpu_moe._judged(row, cell, {"flops": 1e12, "bandwidth": 1e9}, 4)
    assert judged["ratios"] == {"HF loop, eager": 3.0}
    assert judged["regret"] == 3.0
    assert judged["TFLOP/s"] == pytest.approx(cell.flops / 2e-3 / 1e12)
    assert judged["roofline"] == pytest.approx(cell.floor_bytes(8, 4) / 1e9 / 2e-3)


def test_a_replayed_graph_is_held_to_what_came_after_the_capture(bench, monkeypatch):
    cell, side = cells.Cell(SHAPE, 4, False, "random"), bench.sides["grouped"]

    def error(captured) -> float | None:
        monkeypatch.setattr(check.clock, "captured", captured)
        return check.replay_error(side, cell, torch.float32, "cpu")

    assert error(lambda call, _: call() or call) == 0.0
    assert error(lambda call, _: call() or (lambda: None)) > 0.1, "what it replays is of the old tokens"
    assert error(lambda *_: None) is None


def test_both_forms_for_a_few_tokens_are_measured_where_the_kernels_run(bench, monkeypatch):
    x_TD = torch.empty(4, SHAPE.D)
    few, many = cells.Cell(SHAPE, 4, False, "random"), cells.Cell(SHAPE, 64, False, "random")
    assert not {*sides.FORMS} & set(bench.chosen_for(few, x_TD))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert {*sides.FORMS} <= set(bench.chosen_for(few, x_TD))
    for cell in (many, replace(few, train=True)):
        assert not {*sides.FORMS} & set(bench.chosen_for(cell, x_TD))


def test_without_matplotlib_there_is_no_chart_and_no_error(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    row = {"shape": SHAPE.name, "T": 8, "mode": "forward", "routing": "random", "seconds": {sides.OURS: 1.0}}
    chart.draw([row], tmp_path / "chart.svg", title="")
    assert not list(tmp_path.iterdir())
    assert "chart.svg needs matplotlib" in capsys.readouterr().out


def test_without_an_accelerator_nothing_is_written_by_default(capsys):
    with pytest.raises(SystemExit):
        gpu_moe.main(["--device", "cpu"])
    assert "give --out DIR" in capsys.readouterr().err


def test_the_search_finds_the_best_tile_of_a_smooth_landscape_and_stops():
    tile = Tile(64, 64, 64, 4, 3)
    start, wanted = Tiles(tile, tile, tile, tile, tile), Tile(128, 256, 32, 8, 4)
    asked = []

    def seconds(tiles: Tiles) -> float:
        asked.append(tiles)
        if tiles.down.stages == 5:
            return math.inf  # does not fit
        steps = [abs(math.log2(a / b)) for t in tiles[:2] for a, b in zip(t[:4], wanted[:4], strict=True)]
        return 1.0 + sum(steps)

    found, after, before = tune.search(start, tune.FORWARD, seconds, deadline=math.inf)
    assert found.up[:4] == found.down[:4] == wanted[:4]
    assert (after, before) == (1.0, seconds(start))
    assert found[2:] == start[2:], "kernels that were not asked for stay"
    assert len(asked) == len(set(asked)) + 1, "nothing is timed twice (the last call is this test's)"


def test_the_search_keeps_the_rule_when_the_time_is_up():
    tile = Tile(64, 64, 64, 4, 3)
    rule = Tiles(tile, tile, tile, tile, tile)
    assert tune.search(rule, tune.BACKWARD, lambda _: 1.0, deadline=-math.inf) == (rule, 1.0, 1.0)


def test_tiles_that_give_other_numbers_are_no_candidates_however_fast(monkeypatch, bench):
    """The clock holds each program to the rule's results; a form that is not legal here costs no run of its own."""
    cell = cells.Cell(SHAPE, 8, False, "random")
    operands = tune._operands(cell, bench)
    problem, target, ran = tune._problem_of(operands, train=False), TARGETS["sm_80"], []

    def run(runnable, *_):
        ran.append(runnable)
        up = next(x for x in runnable.program.launches if x.name == "up")
        return {"y_TD": torch.full((2, 2), 2.0 if "PERSISTENT" in dict(up.constexprs) else 1.0)}

    monkeypatch.setattr(tune.runner, "prepare", lambda program: SimpleNamespace(program=program))
    monkeypatch.setattr(tune.runner, "run", run)
    monkeypatch.setattr(tune.clock, "in_turns", lambda *_: {"": SimpleNamespace(median=3.0)})
    seconds = tune._clock(problem, target, operands, backwards=False)
    rule = schedule.tiles(problem, target)
    assert seconds(rule) == 3.0
    assert seconds(rule._replace(down=rule.down._replace(weigh=True))) == 3.0
    assert seconds(rule._replace(up=rule.up._replace(persistent=1))) == math.inf
    before = len(ran)
    assert seconds(rule._replace(up=rule.up._replace(tma=1))) == 3.0
    assert len(ran) == before, "sm_80 has no TMA"
    nan = {"y": torch.full((2,), torch.nan)}
    assert not tune.agree(nan, {"y": torch.ones(2)})


def test_every_form_of_a_kernel_is_a_step_of_the_search():
    tile = Tile(64, 64, 64, 4, 3)
    found = set(tune.moves(Tiles(tile, tile, tile, tile, tile), (*tune.FORWARD, *tune.BACKWARD)))
    for kernel in ("up", "down", "hidden", "dx"):
        for fields in ({"persistent": 1}, {"tma": 1}):
            assert Tiles(tile, tile, tile, tile, tile)._replace(**{kernel: tile._replace(**fields)}) in found
    assert {t.down.weigh for t in found} == {False, True}
    wide = tile._replace(n=128)
    first = next(tune.moves(Tiles(wide, wide, wide, wide, wide), tune.BACKWARD))
    assert [t.tma for t in first] == [0, 0, 2, 2, 0], "all kernels of the pass take a form together, before any size"
    persistent = next(t for t in tune.moves(Tiles(wide, wide, wide, wide, wide), tune.FORWARD) if t.up.persistent)
    assert (persistent.up.n, persistent.down.n) == (64, 128), "two wide accumulators would spill"
    assert not any(t.dw.persistent or t.dw.tma or t.up.weigh for t in found)


def test_the_profile_recovers_the_efficiencies_that_made_the_seconds():
    preset = Hardware.preset("H200").model_dump()
    truth = Hardware(**preset | {"fused": ((16, 0.1), (32, 0.2), (64, 0.4), (128, 0.5)), "launch": 2e-6})
    ceilings = {"flops": truth.peak("bfloat16"), "bandwidth": truth.bandwidth, "launch": truth.launch}
    made = []
    for T in (64, 256, 1024, 4096, 16384, 32768):
        for shape in cells.SHAPES[:3]:
            row = {"T": T, "routing": "random", "mode": "forward"}
            work = fit.workload_of(row, "bfloat16", "cuda", shape)
            made.append((work, {name: lowerings()[name].price(work, truth).total for name in ("fused", "grouped")}))
    seen, unseen = fit.halves(made)
    found = fit.profile(Hardware.preset("H200"), ceilings, "bfloat16", seen)
    assert fit.error(Hardware.preset("H200"), unseen)["fused"] > 1.05
    assert fit.error(found, unseen)["fused"] < 1.03
