"""Kernels compiled for GPUs that are not here: no spills, shared memory within limits, registers within the budget.

``make aot`` compiles every selected configuration; this a few of each kind.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re

import pytest

from moepass.kernels.aot import __main__ as command
from moepass.kernels.aot import budgets, compile, problems
from moepass.kernels.emit.block import emit_block
from moepass.kernels.fused import runner, schedule, tma
from moepass.kernels.fused.problem import TARGETS, Tile

pytestmark = pytest.mark.skipif(not compile.available(), reason="Triton cannot compile here")

#: (target, token count of OLMoE's block, launch)
SOME = [
    ("sm_90", 64, "up"),
    ("sm_90", 4096, "up"),
    ("sm_90", 4096, "hidden_gradient"),
    ("sm_90", 4096, "dw_in"),
    ("sm_80", 4096, "up"),
    ("sm_100", 4096, "up"),
    ("gfx942", 4096, "up"),
    ("gfx942", 64, "down"),
]


def launch(target: str, tokens: int, name: str):
    made = problems.launches(problems.SHAPES["olmoe"].problem(tokens), TARGETS[target], train=True)
    return next(x for x in made if x.name == name)


@pytest.mark.parametrize(("target", "tokens", "name"), SOME)
def test_selected_configurations_fit(target, tokens, name):
    selected, key = launch(target, tokens, name), f"olmoe/T{tokens}/{name}"
    found = compile.compile_launch(selected, TARGETS[target])
    assert budgets.unfit(key, selected, TARGETS[target], found) == []
    assert found.matrix_ops > 0
    budget = budgets.find(selected, target)
    if budget is not None:  # a tile chosen since the table was written is held by `make aot`
        assert budgets.broken(key, selected, TARGETS[target], found, budgets.entry(selected, budget)) == []


def test_hopper_multiplies_large_tiles_by_warp_groups():
    assert compile.compile_launch(launch("sm_90", 4096, "up"), TARGETS["sm_90"]).wgmma > 0


def test_descriptors_become_loads_by_the_hardware():
    """cp.async.bulk.tensor in the PTX, from a kernel that has none of it otherwise."""
    case = next(
        c for c in problems.cases(TARGETS["sm_90"], ("olmoe",)) if c.key == "olmoe/T64/train/down+persistent-tma"
    )
    found = compile.compile_launch(case.launch, TARGETS["sm_90"])
    assert found.tma > 0
    assert found.spills == 0
    assert compile.compile_launch(launch("sm_90", 64, "down"), TARGETS["sm_90"]).tma == 0


def test_the_table_holds_the_optional_forms_where_there_is_tma():
    for name, entries in budgets.load().targets.items():
        forms = {key: entry.resources for key, entry in entries.items() if "+" in key}
        assert bool(forms) == (name in tma.TARGETS)
        assert all((found.tma > 0) == ("tma" in key) for key, found in forms.items())


def module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def instructions(compiled) -> list[str]:
    """PTX without what debuggers read."""
    text = compiled.asm["ptx"].split(".section", 1)[0]
    return [line for line in text.splitlines() if not re.match(r"\s*(\.loc|\.file|//|\$L__tmp\d+:|$)", line)]


@pytest.mark.parametrize("name", ["forward_up", "backward_hidden_gradient", "backward_dw_out"])
def test_emitted_kernels_compile_to_the_librarys_instructions(name, tmp_path):
    target = TARGETS["sm_90"]
    emitted = emit_block(problems.SHAPES["olmoe"].problem(64), target, train=True)
    step, text = next((step, text) for step, text in emitted.kernels if step.name == name)
    (tmp_path / f"{name}.py").write_text(text)
    (only,) = step.launches
    ours = getattr(module(tmp_path / f"{name}.py"), only.kernel.partition(".")[2])
    constants = {key: runner.resolve(value) for key, value in only.constexprs}
    library = compile.build(runner.function(only.kernel), only, constants, target)
    assert instructions(compile.build(ours, only, {}, target)) == instructions(library)


def test_a_spill_is_seen():
    """Two accumulators of 128 x 128 in 4 warps cannot fit in 255 registers."""
    target = TARGETS["sm_80"]
    problem = problems.SHAPES["olmoe"].problem(4096)
    wide = schedule.up(schedule.Step(problem, target), Tile(128, 128, 32, 4, 2), save=False, hidden=True)
    found = compile.compile_launch(wide, target)
    assert found.spills > 0
    (said,) = budgets.unfit("up", wide, target, found)
    assert "spills" in said


def test_the_committed_table_has_no_spills_and_fits():
    table = budgets.load().targets
    assert set(table) == set(TARGETS)
    for name, entries in table.items():
        assert len(entries) > 50
        for key, entry in entries.items():
            assert entry.resources.spills == 0, (name, key)
            assert entry.resources.shared <= TARGETS[name].shared, (name, key)
            if key.endswith(("/up", "/down", "/hidden_gradient", "/x_gradient", "/dw_in", "/dw_out")):
                assert entry.resources.matrix_ops > 0, (name, key)


def test_every_way_to_break_a_budget_is_said():
    selected, target = launch("sm_90", 4096, "up"), TARGETS["sm_90"]
    good = compile.Resources(registers=100, spills=0, shared=1000, matrix_ops=8, wgmma=8, tma=2)
    budget = budgets.entry(selected, good)
    assert budgets.broken("k", selected, target, good, budget) == []
    within = good.model_copy(update={"registers": 100 + budgets.SLACK})
    assert budgets.broken("k", selected, target, within, budget) == []
    lost = [({name: 0}, word) for name, word in (("matrix_ops", "matrix"), ("wgmma", "wgmma"), ("tma", "TMA"))]
    for change, word in [({"registers": 200}, "registers"), *lost]:
        (said,) = budgets.broken("k", selected, target, good.model_copy(update=change), budget)
        assert word in said
    other = dataclasses.replace(selected, num_stages=7)
    assert "--write" in budgets.broken("k", other, target, good, budget)[0]
    assert "--write" in budgets.broken("k", selected, target, good, None)[0]
    huge = good.model_copy(update={"shared": target.shared + 1})
    assert "shared memory" in budgets.unfit("k", selected, target, huge)[0]


def test_the_command_writes_what_it_compiles_and_then_holds_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(budgets, "PATH", tmp_path / "budgets.json")
    one = [problems.Case("olmoe/T64/combine", launch("sm_90", 64, "combine"))]
    monkeypatch.setattr(problems, "cases", lambda target, shapes: one)
    budgets.load.cache_clear()
    monkeypatch.setattr(command, "TARGETS", {"sm_90": TARGETS["sm_90"]})
    assert command.main(["--write"]) == 0
    assert set(budgets.load().targets["sm_90"]) == {"olmoe/T64/combine"}
    assert command.main([]) == 0
    one[:] = [problems.Case("olmoe/T64/new", one[0].launch)]
    assert command.main([]) == 1
    assert "no budget" in capsys.readouterr().out
    budgets.load.cache_clear()


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_streamed_weights_are_multiplied_without_matrix_instructions_and_fit(target):
    few = problems.SHAPES["olmoe"].problem(4, train=False)
    for selected in problems.launches(few, TARGETS[target], train=False)[:2]:
        found = compile.compile_launch(selected, TARGETS[target])
        assert budgets.unfit(selected.name, selected, TARGETS[target], found) == []
        assert found.matrix_ops == 0
