"""The fused kernels in Triton's interpreter against the float64 reference: output and every gradient.

Collected only by ``tests/kernels/test_fused_interpreted.py``, in a process where the interpreter is on.
"""

from __future__ import annotations

import pytest
import torch
from fused_cases import Case, assert_same_function, run

from moepass.kernels.fused import schedule

CASES = {
    "ragged": Case(),
    "bias": Case(bias=True),
    "wider_than_a_tile": Case(T=40, D=70, F=72, E=3, bias=True),
    "multiple_of_the_tile": Case(T=32, D=64, F=64, E=4),
    "ungated": Case(activation="gelu", bias=True),
    "clamped": Case(activation="gpt_oss", bias=True, interleaved=True, transposed=True),
    "interleaved": Case(interleaved=True, bias=True),
    "transposed": Case(transposed=True),
    "recomputed": Case(save=False, bias=True),
    "one_expert_takes_all": Case(routing="one", T=20, K=1),
    "skewed": Case(routing="skewed", T=30, E=6),
    "sentinels": Case(routing="sentinels", bias=True),
    "empty_experts": Case(T=3, E=16),
    "one_token": Case(T=1, bias=True),
    "no_token": Case(T=0, bias=True),
    "one_expert": Case(E=1, K=1),
    "top_1": Case(K=1),
    "many_experts": Case(T=5, D=16, F=16, E=70, K=3),
    "int32": Case(index_dtype=torch.int32),
    "float16": Case(dtype=torch.float16, bias=True),
    "bfloat16": Case(dtype=torch.bfloat16, bias=True),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_block_equals_the_reference_with_all_gradients(case):
    assert_same_function(case)


@pytest.mark.parametrize("routing", ["random", "sentinels"])
def test_many_rows_are_routed_in_three_launches_with_the_same_result(routing, monkeypatch):
    monkeypatch.setattr(schedule, "ONE_PROGRAM", 0)
    monkeypatch.setattr(schedule, "ROUTING_BLOCK", 16)
    case = Case(T=41, D=16, F=16, activation="relu", E=7, K=3, routing=routing, seed=3)
    assert_same_function(case)


def test_two_runs_are_equal_to_the_bit():
    case = Case(T=30, bias=True, routing="skewed")
    first, second = run(case, case.fused), run(case, case.fused)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])
