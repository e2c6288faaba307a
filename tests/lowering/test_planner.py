"""The planner chooses the cheapest legal lowering, and cuts T into few ranges that tile the domain."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moepass import errors
from moepass.lowering import planner
from moepass.lowering.base import ExpertArgs, Lowering
from moepass.lowering.hardware import Hardware
from moepass.lowering.measure import Timings
from moepass.lowering.plan import Plan, Price, TokenRange, Verdict, Workload
from moepass.lowering.planner import choose, plan, ranges, regret
from moepass.lowering.registry import lowerings
from moepass.lowering.segments import Segment, segment

CPU = Hardware.preset("cpu")
WORK = Workload(tokens=64, D=512, F=256, E=16, K=2, n=2)
ANY = TokenRange(low=0)


@dataclass(frozen=True)
class Fake(Lowering):
    """A lowering with the price it is told."""

    name: str  # type: ignore[misc]
    seconds: Callable[[int], float]
    refusal: str | None = None

    def legal(self, work: Workload) -> Verdict:
        return Verdict.yes() if self.refusal is None else Verdict.no(self.refusal, "it was told so")

    def price(self, work: Workload, hw: Hardware) -> Price:
        return Price(overhead=self.seconds(work.tokens))

    def build(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, args: ExpertArgs) -> Tensor:
        raise NotImplementedError


def fakes(*members: Fake) -> dict[str, Lowering]:
    return {member.name: member for member in members}


TWO = fakes(Fake("steep", lambda T: 1.0 * T), Fake("flat", lambda T: 100.0 + T / 100))


real_workloads = st.builds(
    Workload,
    tokens=st.integers(1, 4096),
    D=st.sampled_from([64, 256, 1024, 4096]),
    F=st.sampled_from([32, 512, 4096]),
    E=st.sampled_from([4, 8, 64, 256]),
    K=st.sampled_from([1, 2, 4]),
    n=st.integers(1, 2),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    train=st.booleans(),
    capacity_factor=st.sampled_from([None, None, 1.25]),
)
machines = st.sampled_from([CPU, Hardware.preset("H200"), Hardware.preset("A100"), Hardware.preset("MI300X")])


def seconds_of(found: Plan) -> float:
    assert found.chosen.predicted is not None
    return found.chosen.predicted.total


@given(real_workloads, machines)
def test_chosen_lowering_is_legal_and_cheapest(work, hw):
    found = plan(work, ANY, hw)
    assert lowerings()[found.lowering].legal(work).legal
    legal = [lowering for lowering in lowerings().values() if lowering.legal(work).legal]
    assert seconds_of(found) == min(lowering.price(work, hw).total for lowering in legal)
    assert {a.lowering for a in found.alternatives} == set(lowerings())
    assert found.alternatives[0].lowering == found.lowering
    assert all(a.reason for a in found.alternatives if not a.legal)


@given(real_workloads, machines, st.integers(0, 50), st.one_of(st.none(), st.integers(0, 20000)))
def test_ranges_tile_the_domain_and_stay_within_five_percent(work, hw, low, extent):
    domain = TokenRange(low=low, high=None if extent is None else low + extent)
    found = ranges(work, hw, domain)
    assert 1 <= len(found) <= 3
    assert found[0].tokens.low == domain.low
    assert found[-1].tokens.high == domain.high
    for before, after in itertools.pairwise(found):
        assert before.tokens.high is not None
        assert before.tokens.high + 1 == after.tokens.low
        assert before.lowering != after.lowering
    for one in found:
        assert one.workload.tokens in one.tokens
        end = one.tokens.high if one.tokens.high is not None else 4 * one.tokens.low + 7
        examined = {max(1, one.tokens.low), (one.tokens.low + end + 1) // 2, end} - {0}
        for T in [T for T in examined if T in one.tokens]:
            at = work.model_copy(update={"tokens": T})
            assert lowerings()[one.lowering].price(at, hw).total <= 1.05 * seconds_of(plan(at, ANY, hw))
    assert ranges(work, hw, domain) == found


def test_crossover_is_found_to_the_exact_token():
    low, high = ranges(WORK, CPU, ANY, candidates=TWO)
    assert (low.lowering, high.lowering) == ("steep", "flat")
    # T >= 100 + T/100 first holds at T = 102 (101.01 .. is not reached by 101)
    assert low.tokens == TokenRange(low=0, high=101)
    assert high.tokens == TokenRange(low=102, high=None)
    assert (str(low.tokens), str(high.tokens)) == ("T in [0, 101]", "T >= 102")


def test_no_guard_is_spent_on_an_advantage_of_three_percent():
    near = fakes(Fake("a", lambda T: 1.0 if T < 64 else 1.03), Fake("b", lambda T: 1.03 if T < 64 else 1.0))
    assert len(ranges(WORK, CPU, ANY, candidates=near)) == 1
    far = fakes(Fake("a", lambda T: 1.0 if T < 64 else 1.3), Fake("b", lambda T: 1.3 if T < 64 else 1.0))
    assert [p.tokens.low for p in ranges(WORK, CPU, ANY, candidates=far)] == [0, 64]


def test_many_crossovers_are_merged_into_the_least_harmful_three():
    # a and b change places at every power of four; only two borders may stay
    def even(T: int) -> float:
        return 1.0 + 0.1 * ((T.bit_length() // 2) % 2)

    def odd(T: int) -> float:
        return 1.1 - 0.1 * ((T.bit_length() // 2) % 2)

    found = ranges(WORK, CPU, ANY, candidates=fakes(Fake("even", even), Fake("odd", odd)))
    assert len(found) <= 3
    assert found[-1].tokens.high is None
    assert len(ranges(WORK, CPU, ANY, max_ranges=1, candidates=TWO)) == 1


def test_domain_of_one_token_count_gives_one_range():
    (only,) = ranges(WORK, CPU, TokenRange(low=7, high=7), candidates=TWO)
    assert (only.tokens, only.lowering, only.workload.tokens) == (TokenRange(low=7, high=7), "steep", 7)
    (empty,) = ranges(WORK, CPU, TokenRange(low=0, high=0), candidates=TWO)
    assert empty.workload.tokens == 0


def test_range_is_priced_at_the_workloads_own_tokens_where_they_lie_inside():
    low, high = ranges(WORK, CPU, ANY, candidates=TWO)
    assert low.workload.tokens == WORK.tokens
    assert high.workload.tokens > 102


def test_ties_go_to_the_first_candidate():
    same = fakes(Fake("first", lambda T: 1.0), Fake("second", lambda T: 1.0))
    assert plan(WORK, ANY, CPU, candidates=same).lowering == "first"
    assert [p.lowering for p in ranges(WORK, CPU, ANY, candidates=same)] == ["first"]


def test_illegal_candidates_are_listed_last_with_their_reason_and_never_chosen():
    pool = fakes(Fake("cheap", lambda T: 0.001, refusal="not_today"), Fake("dear", lambda T: 1.0))
    found = plan(WORK, ANY, CPU, candidates=pool)
    assert found.lowering == "dear"
    assert (found.alternatives[-1].reason, found.alternatives[-1].predicted) == ("not_today", None)
    assert [p.lowering for p in ranges(WORK, CPU, ANY, candidates=pool)] == ["dear"]


def test_no_legal_lowering_is_an_error_with_every_reason():
    pool = fakes(Fake("a", lambda T: 1.0, refusal="no_a"), Fake("b", lambda T: 1.0, refusal="no_b"))
    for attempt in (lambda: plan(WORK, ANY, CPU, candidates=pool), lambda: ranges(WORK, CPU, ANY, candidates=pool)):
        with pytest.raises(errors.NoLegalLowering, match=r"a: no_a .*; b: no_b"):
            attempt()
    with pytest.raises(errors.NoLegalLowering, match="no candidates"):
        plan(WORK, ANY, CPU, candidates={})


def test_pin_wins_over_price_and_is_marked():
    found = plan(WORK, ANY, CPU, pin="dense")
    assert (found.lowering, found.decided_by) == ("dense", "pin")


@pytest.mark.parametrize(("pin", "detail"), [("densest", "no such lowering"), ("capacity", "dropless_spec")])
def test_bad_pin_is_refused(pin, detail):
    with pytest.raises(errors.BadPin, match=f"'{pin}'.*{detail}.*grouped"):
        plan(WORK, ANY, CPU, pin=pin)


def test_only_capacity_serves_a_spec_that_drops_tokens():
    found = plan(WORK.model_copy(update={"capacity_factor": 1.0}), ANY, CPU)
    assert found.lowering == "capacity"
    assert {a.reason for a in found.alternatives if not a.legal} == {"drops_tokens"}


def test_measurement_decides_over_the_estimate_and_gives_the_regret():
    found = plan(WORK, ANY, CPU, measured={"steep": 3.0, "flat": 2.0}, candidates=TWO)
    assert (found.lowering, found.decided_by, found.alternatives[0].measured) == ("flat", "measurement", 2.0)
    assert regret(found) == 1.0
    pinned = plan(WORK, ANY, CPU, measured={"steep": 3.0, "flat": 2.0}, pin="steep", candidates=TWO)
    assert regret(pinned) == 1.5


def test_candidate_that_failed_to_run_is_illegal_with_its_error():
    timings = Timings({"flat": 2.0}, {"steep": "OutOfMemoryError: 3 GiB"})
    found = plan(WORK, ANY, CPU, measured=timings, candidates=TWO)
    assert found.lowering == "flat"
    assert (found.alternatives[-1].reason, found.alternatives[-1].detail) == (
        "failed_to_run",
        "OutOfMemoryError: 3 GiB",
    )


def test_empty_measurement_falls_back_to_the_estimate():
    found = plan(WORK, ANY, CPU, measured={}, candidates=TWO)
    assert (found.lowering, found.decided_by) == ("steep", "estimate")
    with pytest.raises(errors.NotMeasured, match="steep"):
        regret(found)


def test_choose_agrees_with_plan_and_is_remembered():
    assert choose(WORK, CPU) == plan(WORK, ANY, CPU).lowering
    one = WORK.model_copy(update={"tokens": 1})
    assert choose(one, CPU) == plan(one, ANY, CPU).lowering
    before = choose.cache_info().hits
    choose(WORK.model_copy(), Hardware.preset("cpu"))
    assert choose.cache_info().hits == before + 1


def test_decode_gathers_and_prefill_groups_on_a_cpu():
    found = ranges(WORK, CPU, TokenRange(low=1, high=8192))
    assert found[0].lowering == "gathered"
    assert found[-1].lowering == "grouped"


def test_plan_survives_json():
    found = plan(WORK, ANY, CPU)
    assert Plan.model_validate_json(found.model_dump_json()) == found


def test_token_grid_holds_powers_midpoints_and_ends():
    assert planner.token_grid(TokenRange(low=0, high=20)) == [1, 2, 3, 4, 6, 8, 12, 16, 20]
    assert planner.token_grid(TokenRange(low=5, high=5)) == [5]
    assert planner.token_grid(TokenRange(low=0))[-1] >= planner.HORIZON


costs = st.lists(st.floats(0.1, 10.0), min_size=5, max_size=5)


@given(st.dictionaries(st.sampled_from("abc"), costs, min_size=1), st.integers(1, 3))
def test_segments_are_optimal_among_all_segmentations(table, most):
    found = segment(table, most, tolerance=0.04)
    assert [s.start for s in found] == [0, *[s.stop for s in found[:-1]]]
    assert found[-1].stop == 5
    assert len(found) <= most

    def worst(assignment: list[str]) -> float:
        gaps = (table[name][i] / min(row[i] for row in table.values()) - 1 for i, name in enumerate(assignment))
        return max(gap if gap > 0.04 else 0.0 for gap in gaps)

    best = min(worst(list(choice)) for choice in _assignments(sorted(table), 5, most))
    assert worst([s.lowering for s in found for _ in range(s.stop - s.start)]) == pytest.approx(best)


def _assignments(names: list[str], points: int, most: int) -> list[str]:
    words = [""]
    for _ in range(points):
        words = [word + name for word in words for name in names]
    return [word for word in words if 1 + sum(a != b for a, b in itertools.pairwise(word)) <= most]


def test_segment_example():
    table = {"a": [1.0, 1.0, 5.0, 5.0], "b": [2.0, 2.0, 1.0, 1.0]}
    assert segment(table, 3, 0.04) == [Segment(0, 2, "a"), Segment(2, 4, "b")]
    assert segment(table, 1, 0.04) == [Segment(0, 4, "b")]
