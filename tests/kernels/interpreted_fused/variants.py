"""Forms of the kernels that a tuner may choose, in the interpreter: equal to the plain form, that ``blocks.py`` proves.

Collected only by ``tests/kernels/test_fused_interpreted.py``, in a process where the interpreter is on.
"""

from __future__ import annotations

import functools

import pytest
import torch
from fused_cases import Case, assert_same_function, run

from moepass.kernels.fused import ops, runner, schedule

GEMMS = ("up", "down", "hidden", "dx")
CASES = {
    "ragged": Case(T=20, D=36, F=40, E=3, bias=True),
    "even": Case(T=16, D=32, F=32, E=4, activation="gelu"),
    "gpt_oss": Case(activation="gpt_oss", bias=True, interleaved=True, transposed=True, save=False),
    "sentinels": Case(routing="sentinels", bias=True),
    "empty_experts": Case(T=3, D=16, F=16, E=17),
    "no_token": Case(T=0),
}


@pytest.fixture
def choose(monkeypatch):
    """Gives the named kernels' tiles other fields from now on."""
    rule = schedule.tiles

    def chosen(kernels, **fields):
        @functools.cache
        def tiles(problem, target):
            made = rule(problem, target)
            return made._replace(**{name: getattr(made, name)._replace(**fields) for name in kernels})

        monkeypatch.setattr(schedule, "tiles", tiles)
        ops.reload_tiles()

    yield chosen
    monkeypatch.undo()
    ops.reload_tiles()


@pytest.fixture
def constants(monkeypatch):
    """The constants of each launch from now on, by its name."""
    made, prepare = {}, runner.prepare

    def recorded(program):
        made.update({launch.name: dict(launch.constexprs) for launch in program.launches})
        return prepare(program)

    monkeypatch.setattr(runner, "prepare", recorded)
    return made


def assert_equal(case, plain):
    y, gradients = run(case, case.fused)
    assert torch.equal(y, plain[0])
    assert all(torch.equal(g, plain[1][name]) for name, g in gradients.items())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_persistent_programs_compute_what_a_program_per_tile_does(case, choose, constants):
    plain = run(case, case.fused)
    choose(GEMMS, persistent=3)
    assert_equal(case, plain)
    names = {name for name, made in constants.items() if made.get("PERSISTENT")}
    assert names == {"up", "down", "hidden_gradient", "x_gradient"}


#: Widths whose strides are multiples of 16 bytes, not of the tiles.
DESCRIBED = {
    "ragged": (Case(T=20, D=36, F=40, E=3, bias=True), 0),
    "transposed": (Case(D=24, F=40, transposed=True, save=False), 2),
    "interleaved": (Case(D=24, F=20, interleaved=True, bias=True, routing="sentinels"), 0),
    "ungated": (Case(T=16, D=32, F=32, E=4, activation="gelu"), 2),
    "float16": (Case(D=24, F=40, dtype=torch.float16), 2),
    "bfloat16": (Case(D=24, F=40, dtype=torch.bfloat16), 0),
}


@pytest.mark.parametrize(("case", "persistent"), DESCRIBED.values(), ids=DESCRIBED)
def test_tiles_fetched_by_descriptors_are_those_of_the_pointers(case, persistent, choose, constants):
    plain = run(case, case.fused)
    choose(GEMMS, tma=2, persistent=persistent)
    assert_equal(case, plain)
    levels = {name: made["TMA"] for name, made in constants.items() if "TMA" in made}
    assert levels == {"up": 1, "down": 2, "hidden_gradient": 1, "x_gradient": 2}


def test_weights_that_start_between_multiples_of_16_bytes_are_read_by_pointers(choose, constants):
    case = Case(T=3, D=16, F=16, E=2)
    leaves = {name: t.detach().float() for name, t in case.leaves().items()}
    shifted = torch.empty(leaves["w_out"].numel() + 1)[1:].view_as(leaves["w_out"]).copy_(leaves["w_out"])
    choose(GEMMS, tma=2)
    given = (leaves["x"], case.index(), leaves["weight"], leaves["w_in"])
    y = [ops.fused_experts(*given, w_out, activation="swiglu") for w_out in (shifted, leaves["w_out"])]
    assert "TMA" in constants["up"], "the second call's"
    ops.reload_tiles()
    ops.fused_experts(*given, shifted, activation="swiglu")
    assert "TMA" not in constants["up"]
    assert torch.equal(*y)


def test_rows_behind_the_last_expert_never_reach_a_result(choose, monkeypatch):
    """A descriptor's tile of rows goes on behind the rows that there are, into memory that nobody wrote."""
    allocate = runner.allocate

    def poisoned(buffer, sizes, device):
        made = allocate(buffer, sizes, device)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(runner, "allocate", poisoned)
    choose(GEMMS, tma=2)
    assert_same_function(Case(T=11, D=24, F=40, routing="sentinels", bias=True))


WEIGHED = {name: CASES[name] for name in ("ragged", "sentinels", "no_token")} | {"float16": DESCRIBED["float16"][0]}


@pytest.mark.parametrize("case", WEIGHED.values(), ids=WEIGHED)
def test_rows_weighted_in_the_epilogue_of_down_give_the_same_block_and_gradients(case, choose, constants):
    choose(("down",), weigh=True)
    assert_same_function(case)
    assert "weight_R" not in constants["down"]
    assert constants["combine"]["weight_R"] is None


def test_weights_behind_sentinels_are_not_read_where_down_weighs(choose):
    choose(("down",), weigh=True)
    case = Case(T=6, D=16, F=16, routing="sentinels")
    given = case.leaves()
    outside = (case.index() < 0) | (case.index() >= case.E)
    given["weight"] = torch.where(outside, torch.nan, given["weight"].detach())
    assert outside.any()
    assert case.fused(given).isfinite().all()
