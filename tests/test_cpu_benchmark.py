"""``benchmarks.cpu_moe`` and ``benchmarks.generate``: sides agree, a wrong one is caught, the arithmetic by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
import transformers
from tiny import fresh  # noqa: F401

from benchmarks import cpu_moe, generate
from benchmarks.cpu import cells, clock, sides, verdict
from benchmarks.cpu.cells import TINY, Cell
from moepass.lowering import planner
from moepass.lowering.hardware import load_hardware
from moepass.lowering.plan import Workload

LOWERINGS = ("grouped", "dense", "gathered")


def test_the_whole_cpu_command_on_a_tiny_block(tmp_path, capsys):
    command = "--shapes tiny --tokens 1,32 --dtypes float32 --inner eager --repeats 1 --budget 0.01 --run try"
    path = cpu_moe.main([*command.split(), "--modes", cells.TRAIN, "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "cpu_moe_try.json").read_text())["cells"]
    assert path.name == "cpu_moe_try.md"
    assert [(r["T"], r["mode"]) for r in rows] == [(T, cells.TRAIN) for T in (1, 32)]
    hf = {f"{name}{how}" for name in sides.HF for how in ("", sides.INDUCTOR)}
    for row in rows:
        assert row["not run"] == {}
        assert set(row["seconds"]) == {f"moepass {name}" for name in LOWERINGS} | hf
        assert row["regret"] >= 1.0
        assert row["HF / moepass"] > 0
    assert "regret" in capsys.readouterr().out


@pytest.mark.parametrize("shape", cells.SHAPES, ids=lambda s: s.name)
def test_benchmark_blocks_are_stock_modules_of_the_stated_widths(shape):
    with torch.device("meta"):
        block = cells.block(shape, torch.bfloat16)
    assert type(block).__module__.startswith("transformers.models")
    assert block.experts.gate_up_proj.shape == (shape.E, 2 * shape.F, shape.D)
    assert block.experts.down_proj.shape == (shape.E, shape.D, shape.F)
    assert block.gate.top_k == shape.K


def test_a_side_with_other_weights_is_named_and_not_timed():
    original = cells.block(TINY, torch.float32)
    good, bad = (sides._hf(original, name, None) for name in ("eager", "grouped_mm"))
    with torch.no_grad():
        bad.module.experts.down_proj.mul_(1.01)
    kept, wrong = cpu_moe.checked(
        [good, bad], sides.reference(TINY, torch.float32), [Cell(TINY, 5, torch.float32, True)]
    )
    assert kept == [good]
    assert list(wrong) == ["grouped_mm"]
    assert "differs from HF's plain loop by" in wrong["grouped_mm"]


def test_the_reference_of_a_bfloat16_block_is_float32_of_the_same_values():
    cell = Cell(TINY, 5, torch.bfloat16, True)
    truth = sides.reference(TINY, torch.bfloat16).step(cell)()
    ours = sides._hf(cells.block(TINY, torch.bfloat16), "eager", None).step(cell)()
    assert 0 < sides.error(ours, truth) < 0.02


def test_gathers_over_two_gibibytes_are_refused_with_the_size():
    side = sides._hf(cells.block(TINY, torch.float32), "batched_mm", None)
    cell = Cell(cells.SHAPES[0], 256, torch.float32, False)
    assert cell.pair_bytes == 256 * 4 * 3 * 1024 * 512 * 4
    assert side.refuses(cell) == "it would gather 6.0 GiB of weights (limit 2 GiB)"
    assert side.refuses(Cell(cells.SHAPES[0], 64, torch.float32, False)) is None


def test_choices_are_those_of_the_planner_at_every_token_count():
    found = sides.choices(TINY, torch.float32, (1, 4, 64, 512), train=False)
    work = Workload(tokens=0, D=TINY.D, F=TINY.F, E=TINY.E, K=TINY.K, n=2)
    for T, site in found.items():
        assert T in site.tokens
        prices = {a.lowering: a.predicted.total for a in planner.plan(
            work.model_copy(update={"tokens": T}), site.tokens, load_hardware()).alternatives if a.legal}  # fmt: skip
        assert prices[site.lowering] <= (1 + planner.TOLERANCE) * min(prices.values())


def test_runs_of_a_side_follow_from_its_first_call():
    first = {"fast": 0.1, "near": 0.29, "far": 0.5, "further": 1.5, "slow": 4.5}
    assert clock.runs(first, 100.0, 7) == {"fast": 7, "near": 7, "far": 2, "further": 0, "slow": 0}
    assert clock.runs(first, 1.2, 7) == {"fast": 3, "near": 3, "far": 2, "further": 0, "slow": 0}
    assert clock.runs({"short": 0.001}, 100.0, 7) == {"short": clock.MANY}
    assert clock.runs({"only": 9.0}, 0.0, 7) == {"only": 0}
    assert clock.runs({"one": 0.4, "other": 0.6}, 0.0, 7) == {"one": 3, "other": 3}


def test_a_side_that_is_predicted_hopeless_is_not_called_again():
    side = sides._hf(cells.block(TINY, torch.float32), "eager", None)
    other = sides._hf(cells.block(TINY, torch.float32), "grouped_mm", None)
    known = clock.Group({"eager": (16, 5.0)})
    found = clock.measure([other, side], Cell(TINY, 64, torch.float32, False), known, 0.1, 1)
    assert set(found.timings) == {"grouped_mm"}
    assert "predicted 20.0 s" in found.not_run["eager"]


def test_where_the_fastest_is_slow_only_one_that_may_beat_it_is_run():
    assert clock._hopeless(6.0, [3.5]) is None  # under twice as long as one that is quick
    assert clock._hopeless(10.0, [16.7]) is None
    assert clock._hopeless(17.0, [16.7, 30.0]).startswith("predicted 17.0 s")
    assert clock._hopeless(3.9, [0.1]) is None
    assert clock._hopeless(40.0, []) == "predicted 40.0 s from a smaller T (limit 20 s)"


def test_filling_the_caches_measures_and_writes_nothing(tmp_path, capsys):
    command = f"--compile --shapes tiny --dtypes float32 --modes forward --inner eager --out {tmp_path}"
    assert cpu_moe.main(command.split()) is None
    assert "min  tiny torch.float32 forward" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_verdicts_on_cells_by_hand():
    cell = Cell(TINY, 1024, torch.float32, True)
    assert cell.flops == 3 * 2 * (3 * 32 * 16) * 1024 * 2
    assert Cell(TINY, 1, torch.float32, False).active_bytes == 2 * (3 * 32 * 16) * 4
    seconds = {"moepass grouped": 2.0, "moepass dense": 1.6, "eager": 1.0, "eager, Inductor": 5.0,
               "batched_mm, Inductor": 3.0}  # fmt: skip
    ceiling = {"flops": cell.flops / 1.5, "bandwidth": 1.0}
    found = verdict.judged(cell, seconds, "grouped", ceiling)
    assert found["regret"] == pytest.approx(1.25)
    assert (found["best HF"], found["HF / moepass"]) == ("batched_mm, Inductor", pytest.approx(1.5))
    assert found["of the GEMM rate"] == pytest.approx(0.75)
    assert math.isnan(found["over reading the weights"])
    one = {"shape": "tiny", "dtype": "float32", "seconds": seconds, "chosen": "grouped"}
    rows = [one | found | {"T": 1024, "mode": "forward"}, one | found | {"T": 16, "mode": "forward", "regret": 1.0}]
    figures = verdict.figures(rows)
    assert (figures["regret <= 1.05"], figures["worst regret"]) == (0.5, pytest.approx(1.25))
    assert figures["best HF / moepass"] == pytest.approx(1.5)
    said = verdict.verdicts(rows)
    assert any("worst regret: 1.25 (target: at most 1.25; met)" in line for line in said)
    assert any("HF eager over moepass, 2 cells: 0.5 (target: at least 1.8; MISSED)" in line for line in said)


def eager_side() -> generate.Side:
    model = generate.build(generate.TINY, torch.float32)
    cache = transformers.StaticCache(config=model.config, max_cache_len=12)
    return generate.Side(model, model, cache)


def test_generation_step_by_step_gives_the_logits_of_one_long_forward():
    side, prompt = eager_side(), torch.randint(2, 64, (1, 8))
    twice = [generate.generate(side, prompt, 4) for _ in range(2)]
    with torch.no_grad():
        whole = side.model(torch.cat([prompt, twice[0].tokens[None]], 1)).logits[0, 7:-1]
    for found in twice:
        assert torch.allclose(found.logits, whole, atol=1e-5)
        assert torch.equal(found.tokens, whole.argmax(-1))


def test_a_generating_side_with_another_router_is_named():
    right, wrong = eager_side(), eager_side()
    with torch.no_grad():
        wrong.model.model.layers[0].mlp.gate.weight.mul_(-1)
    named = generate.checked(
        {"moepass": wrong, "HF": right, "same": eager_side()}, torch.randint(2, 64, (1, 8)), 4, torch.float32
    )
    assert list(named) == ["moepass"]
