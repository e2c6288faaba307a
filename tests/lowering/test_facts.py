"""Facts: what was measured is preferred for the same workload, corrects estimates near by, and the plan says so."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from moepass.lowering.facts import LEAST, MOST, REACH, Corrections, Fact, Point
from moepass.lowering.hardware import Hardware
from moepass.lowering.plan import TokenRange, Workload
from moepass.lowering.planner import choose, plan, ranges
from moepass.lowering.registry import lowerings

CPU = Hardware.preset("cpu")
WORK = Workload(tokens=64, D=256, F=128, E=16, K=2, n=2)
NAMES = ("dense", "gathered", "grouped")


def at(T: int) -> Workload:
    return WORK.model_copy(update={"tokens": T})


def price(name: str, T: int) -> float:
    return lowerings()[name].price(at(T), CPU).total


def fact(T: int, **factors: float) -> Fact:
    """Times that are ``factors`` of the estimates."""
    return Fact(work=at(T), seconds=tuple((n, f * price(n, T)) for n, f in factors.items()), source="analyze", runs=5)


def machine(*facts: Fact) -> Hardware:
    return Hardware.model_validate(dict(CPU) | {"facts": facts})


def only(T: int) -> TokenRange:
    return TokenRange(low=T, high=T)


def cheapest(T: int) -> str:
    return min(NAMES, key=lambda name: price(name, T))


def test_the_same_workload_is_decided_by_what_was_measured():
    best, *others = sorted(NAMES, key=lambda name: price(name, 64))
    slow_best = {best: 40.0, others[0]: 1.0, others[1]: 1.0}
    for chosen in (
        plan(at(64), only(64), machine(fact(64, **slow_best))),
        ranges(at(64), machine(fact(64, **slow_best)), only(64))[0],
    ):
        times = {a.lowering: a.measured for a in chosen.alternatives if a.legal}
        assert chosen.lowering == min(times, key=lambda name: times[name]) == others[0] != best
        assert chosen.decided_by == "measurement"
        assert chosen.evidence == "measured on this machine before, by --analyze (5 runs)"
        assert chosen.chosen.measured == pytest.approx(price(others[0], 64))
        assert chosen.chosen.predicted.total == pytest.approx(price(others[0], 64)), "the estimate stays what it is"


def test_a_workload_near_by_is_decided_by_corrected_estimates():
    best = cheapest(96)
    factors = {name: 15.0 if name == best else 2.0 for name in NAMES}
    chosen = plan(at(96), only(96), machine(fact(64, **factors)))
    assert chosen.decided_by == "learned"
    assert chosen.evidence == "estimates corrected by what was measured on this machine at T = 64"
    corrected = {a.lowering: a.corrected for a in chosen.alternatives if a.legal}
    assert corrected == {name: pytest.approx(factors[name] * price(name, 96)) for name in NAMES}
    assert chosen.lowering == min(NAMES, key=lambda name: corrected[name]) != best
    assert all(a.measured is None for a in chosen.alternatives)


def test_far_from_any_fact_estimates_stand_alone():
    hw, far = machine(fact(64, dense=9.0, grouped=9.0)), int(64 * REACH) + 1
    assert plan(at(far), only(far), hw) == plan(at(far), only(far), CPU)
    assert plan(at(15), only(15), hw).evidence is None


@pytest.mark.parametrize("change", [{"D": 512}, {"dtype": "bfloat16"}, {"train": True}, {"routing": "balanced"}])
def test_another_block_learns_nothing(change):
    other = at(64).model_copy(update=change)
    assert plan(other, only(64), machine(fact(64, dense=9.0, grouped=9.0))) == plan(other, only(64), CPU)


def test_a_model_on_the_meta_device_is_planned_as_if_it_were_here():
    meta = at(64).model_copy(update={"device": "meta"})
    hw = machine(fact(64, dense=1.0, gathered=1.0, grouped=1.0))
    assert plan(meta, only(64), hw).decided_by == "measurement"


def test_a_pin_and_a_fresh_measurement_are_not_overruled():
    hw = machine(fact(64, dense=0.1, grouped=9.0))
    assert plan(at(64), only(64), hw, pin="grouped").lowering == "grouped"
    fresh = plan(at(64), only(64), hw, measured={"grouped": 1e-9, "dense": 1.0})
    assert (fresh.lowering, fresh.evidence, fresh.chosen.measured) == ("grouped", None, 1e-9)


def test_ranges_move_with_the_facts():
    before = ranges(at(64), CPU, TokenRange(low=1))
    slower = {"grouped": 12.0, "dense": 1.0, "gathered": 1.0}
    hw = machine(*(fact(T, **slower) for T in (256, 1024, 4096)))
    assert ranges(at(64), hw, TokenRange(low=1)) != before
    for T in (256, 1024, 4096):
        chosen = next(p.lowering for p in ranges(at(64), hw, TokenRange(low=1)) if T in p.tokens)
        times = dict(fact(T, **slower).seconds)
        assert times[chosen] <= 1.05 * min(times.values())


def test_eager_calls_learn_too():
    best = cheapest(64)
    hw = machine(fact(64, **{name: 30.0 if name == best else 1.0 for name in NAMES}))
    assert choose(at(64), CPU) == best
    assert choose(at(64), hw) != best


def test_what_was_not_timed_is_taken_to_err_as_much_as_the_worst():
    point = Point.of(fact(64, dense=2.0, grouped=3.0), {name: price(name, 64) for name in NAMES})
    assert point.factor("dense") == pytest.approx(2.0)
    assert point.factor("gathered") == pytest.approx(3.0)
    optimist = Point.of(fact(64, dense=0.5), {"dense": price("dense", 64)})
    assert optimist.factor("grouped") == 1.0, "nothing gets faster by not being timed"


@given(st.integers(1, 10_000), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_corrections_lie_between_their_neighbours_and_are_bounded(T, one, two):
    ratios = {64: {"dense": _bounded(one)}, 200: {"dense": _bounded(two)}}
    points = [Point(tokens, fact(tokens, dense=1.0), ratio) for tokens, ratio in ratios.items()]
    factor = Corrections.of(points).factor("dense", T)
    if T < 64 / REACH or T > 200 * REACH:
        assert factor is None
    else:
        ends = sorted((_bounded(one), _bounded(two)))
        assert LEAST <= ends[0] * (1 - 1e-9) <= factor <= ends[1] * (1 + 1e-9) <= MOST * (1 + 1e-9) or factor in ends


def _bounded(ratio: float) -> float:
    return min(max(ratio, LEAST), MOST)


def test_a_ratio_beyond_belief_is_bounded():
    point = Point.of(fact(64, dense=1e6), {"dense": price("dense", 64)})
    assert point.factor("dense") == MOST


@pytest.mark.parametrize("seconds", [(), (("dense", 0.0),), (("dense", -1.0),), (("dense", float("inf")),)])
def test_impossible_times_are_no_facts(seconds):
    with pytest.raises(ValidationError):
        Fact(work=WORK, seconds=seconds, source="measure", runs=1)
