"""Random shapes, dtypes, activations and capacities: every legal lowering against the float64 reference.

The cases are those of ``moepass verify``: random routing, idle experts, one token, none, and rows that hold NaN.
"""

from __future__ import annotations

import itertools

import fuzzing
from hypothesis import given
from hypothesis import strategies as st

from moepass import pointwise
from moepass.lowering.hardware import load_hardware
from moepass.lowering.plan import TokenRange, Workload
from moepass.lowering.planner import HORIZON, ranges
from moepass.verify.lowerings import check_lowerings

ACTIVATIONS = ["swiglu", "gelu", "relu2", "gpt_oss", "tanh(g)*u + 0.5*u", "exp(-softplus(g))", "g*g*g*u", "abs(g)"]


@st.composite
def workloads(draw) -> tuple[Workload, str]:
    activation = pointwise.canonical(draw(st.sampled_from(ACTIVATIONS)))
    E = draw(st.integers(1, 9))
    work = Workload(
        tokens=0, D=draw(st.integers(1, 19)), F=draw(st.integers(1, 19)), E=E, K=draw(st.integers(1, E)),
        n=pointwise.n_inputs(activation), dtype=draw(st.sampled_from(["float64", "float32"])), train=True,
        bias=draw(st.booleans()), capacity_factor=draw(st.none() | st.floats(0.05, 4.0)),
    )  # fmt: skip
    return work, activation


@fuzzing.inputs(15)
@given(workloads())
def test_every_legal_lowering_of_a_random_workload_is_the_reference(drawn):
    work, activation = drawn
    checks = list(check_lowerings("fuzz", work, activation))
    failed = [f"{c.subject}: {c.name}: {c.error} {c.detail}" for c in checks if c.status == "failed"]
    assert not failed, failed
    assert any(c.status == "ok" for c in checks)
    fuzzing.tried["workloads through every legal lowering"] += 1
    fuzzing.tried["comparisons of them"] += sum(c.status == "ok" for c in checks)


@fuzzing.inputs(40)
@given(workloads(), st.integers(0, 5000), st.none() | st.integers(0, HORIZON), st.sampled_from(["H100", "cpu", "A100"]))
def test_the_plans_of_a_random_workload_tile_its_domain(drawn, low, width, hardware):
    work, _ = drawn
    hw = load_hardware(None if hardware == "cpu" else hardware, "cpu")
    domain = TokenRange(low=low, high=None if width is None else low + width)
    plans = ranges(work, hw, domain)
    assert 1 <= len(plans) <= 3
    assert plans[0].tokens.low == domain.low
    assert plans[-1].tokens.high == domain.high
    for before, after in itertools.pairwise(plans):
        assert before.tokens.high is not None
        assert after.tokens.low == before.tokens.high + 1
    assert all(plan.chosen.legal for plan in plans)
    fuzzing.tried["workloads through the planner"] += 1
