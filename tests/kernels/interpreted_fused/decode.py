"""A few tokens in Triton's interpreter: weights streamed without tiles, against the float64 reference.

Collected only by ``tests/kernels/test_fused_interpreted.py``, in a process where the interpreter is on.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fused_cases import TOLERANCE, Case, assert_same_function

from moepass.kernels.fused import ops, runner, schedule_decode

SMALL = Case(T=3, D=20, F=24, E=5, K=2, save=False)
CASES = {
    "two_rows_at_once": replace(SMALL, T=2),
    "rows_share_experts": replace(SMALL, E=2, bias=True),
    "one_token": replace(SMALL, T=1, K=3, bias=True),
    "ungated": replace(SMALL, activation="gelu", bias=True),
    "clamped": replace(SMALL, activation="gpt_oss", bias=True, interleaved=True, transposed=True),
    "interleaved": replace(SMALL, T=1, interleaved=True, bias=True),
    "transposed": replace(SMALL, transposed=True),
    "sentinels": replace(SMALL, T=4, routing="sentinels", bias=True),
    "all_rows_to_one_expert": replace(SMALL, T=4, K=3, routing="one"),
    "even": replace(SMALL, D=32, F=32),
    "many_experts": replace(SMALL, T=2, D=16, F=16, E=512, K=3),
    "int32": replace(SMALL, index_dtype=torch.int32),
    "float16": replace(SMALL, T=4, dtype=torch.float16, bias=True),
    "bfloat16": replace(SMALL, T=4, dtype=torch.bfloat16, bias=True),
}


def forward(case: Case, launches: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernels' output and the reference's, after so many launches."""
    leaves, made = case.leaves(), []
    run = runner.run

    def counted(runnable, *rest):
        made.append([launch.name for launch in runnable.program.launches])
        return run(runnable, *rest)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(runner, "run", counted)
        got = case.fused(leaves)
    assert [len(names) for names in made] == [launches], made
    assert made[0][-2:] == ["stream_down", "gather_sum"]
    return got, case.reference(leaves).detach()


def assert_near(case: Case, launches: int) -> None:
    got, wanted = forward(case, launches)
    assert got.dtype == case.dtype
    assert (got.double() - wanted).abs().max() <= TOLERANCE[case.dtype] * wanted.abs().max()


@pytest.fixture(autouse=True)
def fresh():
    yield
    ops.reload_tiles()
    schedule_decode.forward.cache_clear()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_streamed_weights_give_the_references_output(case):
    assert_near(case, launches=3)


@pytest.mark.parametrize("name", ["rows_share_experts", "clamped", "sentinels", "bfloat16"])
def test_contractions_in_parts_give_the_same(name, monkeypatch):
    """Where the experts are too few to keep every SM busy; here each SM is to have a thousand programs."""
    monkeypatch.setattr(schedule_decode, "PROGRAMS", 1000)
    monkeypatch.setattr(schedule_decode, "ALONG", 4)
    monkeypatch.setattr(schedule_decode, "ELEMENTS", dict.fromkeys((1, 2, 4), 32))
    monkeypatch.setattr(schedule_decode, "ACROSS", 8)
    assert_near(CASES[name], launches=4)


def test_an_expert_with_more_rows_than_are_held_at_once_is_read_again():
    """A token may name an expert twice, and a program serves any T."""
    case = replace(SMALL, T=4, K=3, routing="one")
    problem = ops.problem_of(operands(case), case.activation, interleaved=False, save=False)
    few = runner.prepare(schedule_decode.forward(replace(problem, tokens=2), runner.target(torch.device("cpu"))))
    got = runner.run(few, case.T, operands(case).bindings(), torch.device("cpu"))["y_TD"]
    wanted = case.reference(case.leaves()).detach()
    assert (got.double() - wanted).abs().max() <= TOLERANCE[case.dtype] * wanted.abs().max()


def operands(case: Case) -> ops.Operands:
    leaves = {name: t.detach().float() for name, t in case.leaves().items()}
    return ops.Operands(leaves["x"], case.index(), leaves["weight"], leaves["w_in"], leaves["w_out"], None, None)


def test_streams_are_equal_to_the_bit_twice():
    case = CASES["rows_share_experts"]
    assert torch.equal(forward(case, 3)[0], forward(case, 3)[0])


def test_gradients_after_a_streamed_forward_pass_are_the_tiles():
    assert_same_function(replace(SMALL, bias=True))
