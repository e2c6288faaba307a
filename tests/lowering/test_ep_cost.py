"""Prices of the expert-parallel forms: by hand, against the planning figures, and where they must agree."""

from __future__ import annotations

import itertools

import pytest

from moepass import errors
from moepass.lowering import planner
from moepass.lowering.ep_cost import local_plan, price
from moepass.lowering.ep_legal import factor, legal, worst_factor
from moepass.lowering.ep_plan import choose_form, form_plan, form_ranges, form_sweep, on_mesh
from moepass.lowering.forms import FORMS, FormPrice
from moepass.lowering.hardware import Hardware
from moepass.lowering.mesh import MeshSpec, parse
from moepass.lowering.plan import TokenRange, Workload

H200, CPU = Hardware.preset("H200"), Hardware.preset("cpu")
OLMOE = Workload(tokens=4096, D=2048, F=1024, E=64, K=8, n=2, dtype="bfloat16", device="meta", routing="balanced")
DEEPSEEK = OLMOE.model_copy(update={"D": 7168, "F": 2048, "E": 256})
ROWS = 4096 * 8


def mesh(text: str, links: str | None = None, hw: Hardware = H200) -> MeshSpec:
    return parse(text, hw, links=links)


def priced(form: str, work: Workload, text: str, hw: Hardware = H200, **changes: object) -> FormPrice:
    found = price(form, on_mesh(work, mesh(text, hw=hw), **changes), hw)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("work", "text", "seconds"),
    [(OLMOE, "ep=8", 823e-6), (DEEPSEEK, "ep=8", 2780e-6), (OLMOE, "node=8", 5.3e-3)],
)
def test_exchange_takes_what_the_planning_notes_say(work, text, seconds):
    """reference/kernels.md 2.4: dispatch and combine of T=4096 on NVLink and on InfiniBand, one copy for each row."""
    assert priced("all_to_all", work, text).communication == pytest.approx(seconds, rel=0.01)


def test_exact_exchange_moves_each_row_once_each_way_and_no_more():
    infer = priced("all_to_all", OLMOE, "node=2,ep=4")
    train = priced("all_to_all", OLMOE.model_copy(update={"train": True}), "node=2,ep=4")
    bound = 2 * (1 - 1 / 8) * ROWS * 2048 * 2
    assert sum(t.total for t in infer.traffic) == pytest.approx(bound)
    assert sum(t.total for t in train.traffic) == pytest.approx(2 * bound), "the adjoints move as much again"


def test_volumes_of_the_other_forms_by_hand():
    token = 2048 * 2
    gathered = priced("all_gather", OLMOE, "ep=8").traffic[0]
    assert (gathered.dispatch, gathered.combine) == (7 * 4096 * (token + 8 * 12), 7 * 4096 * token)
    reduced = priced("replicated", OLMOE, "ep=8", same_tokens=True).traffic[0]
    assert (reduced.dispatch, reduced.combine) == (0, 2 * 7 / 8 * 4096 * token)
    buffered = priced("ragged", OLMOE, "ep=8", buffer_factor=1.5).traffic[0]
    assert buffered.dispatch == 1.5 * 7 / 8 * ROWS * (token + 8)
    assert buffered.combine == 1.5 * 7 / 8 * ROWS * token
    levels = priced("hierarchical", OLMOE, "node=2,ep=4").traffic
    assert [level.combine for level in levels] == [ROWS / 2 * token, ROWS * 3 / 4 * token]


def test_two_levels_send_a_token_once_to_each_distinct_node():
    """E=64, K=8 on two nodes: a token misses the other node with C(32,8)/C(64,8), about 1/400."""
    flat, two = (priced(form, OLMOE, "node=2,ep=4") for form in ("all_to_all", "deduplicated"))
    assert flat.traffic[0].combine == pytest.approx(ROWS / 2 * 2048 * 2)
    assert two.traffic[0].combine == pytest.approx(4096 * (1 - 1 / 421.8) * 2048 * 2, rel=1e-3)
    assert two.communication < 0.55 * flat.communication


def test_one_rank_costs_what_the_planner_says():
    for train in (False, True):
        work = OLMOE.model_copy(update={"train": train})
        alone = planner.plan(work, TokenRange(low=0), H200)
        found = form_plan(on_mesh(work, mesh("node=1,ep=1")), H200)
        assert (found.form, found.local.lowering) == ("local", alone.lowering)
        assert found.chosen.predicted.total == pytest.approx(alone.chosen.predicted.total)
        assert found.chosen.predicted.communication == 0
        assert [o.reason for o in found.options[1:]] == ["one_rank"] * 6


def test_experts_of_a_rank_are_planned_as_a_block_of_their_own():
    work = on_mesh(OLMOE, mesh("ep=8"))
    local = local_plan("all_to_all", work, H200).workload
    assert (local.tokens, local.E, local.K, local.mesh) == (ROWS, 8, 1, None)
    assert price("all_to_all", work, H200).weight_bytes == 8 * 3 * 2048 * 1024 * 2


def test_everyone_waits_for_the_busiest_rank():
    even = priced("all_to_all", OLMOE, "ep=8")
    skewed = priced("all_to_all", OLMOE.model_copy(update={"routing": "skew=1.5"}), "ep=8")
    assert (even.rows, even.busiest) == (ROWS, ROWS)
    assert skewed.busiest > 2 * skewed.rows
    assert skewed.compute > 1.5 * even.compute
    assert skewed.communication > 2 * even.communication
    assert sum(t.total for t in skewed.traffic) == sum(t.total for t in even.traffic), "the mean rank sends the same"


def test_a_capacity_bounds_the_busiest_rank():
    work = OLMOE.model_copy(update={"routing": "skew=1.5", "capacity_factor": 1.25})
    found = priced("all_to_all", work, "ep=8")
    assert found.busiest == pytest.approx(1.25 * ROWS)


def test_chunks_would_hide_communication_where_that_pays():
    busy = priced("all_to_all", DEEPSEEK.model_copy(update={"tokens": 16384}), "ep=8")
    assert busy.overlap.chunks > 1
    assert busy.overlap.hidden > 0
    assert max(busy.compute, busy.communication) < busy.overlap.total < busy.total
    assert "would save" in busy.overlap.reason
    few = priced("all_to_all", DEEPSEEK.model_copy(update={"tokens": 64}), "ep=8")
    assert (few.overlap.chunks, few.overlap.hidden, few.overlap.total) == (1, 0.0, pytest.approx(few.total))
    assert "weights read again" in few.overlap.reason


def test_slices_of_experts_pay_for_a_reduce():
    work = OLMOE.model_copy(update={"train": True})
    whole, half = (price("all_to_all", on_mesh(work, parse(f"ep=8,tp={tp}", H200, tp="tp")), H200) for tp in (1, 2))
    assert half.weight_bytes == whole.weight_bytes / 2
    assert half.compute < whole.compute
    rows, reduce = half.traffic
    assert rows == whole.traffic[0], "every rank of tp sends the rows of its tokens"
    token = 4096 * 2048 * 2
    assert (reduce.dim, reduce.dispatch, reduce.combine) == ("tp", 0.0, token), "2(tp-1)/tp of the result"
    assert reduce.backward == token + 4096 * 8 * 4, "gradients of the tokens, and of the routing weights"
    assert half.communication > whole.communication


def test_a_width_that_slices_do_not_divide_is_refused_with_both_numbers():
    found = legal("all_to_all", on_mesh(OLMOE, parse("ep=8,tp=3", H200, tp="tp")))
    assert (found.legal, found.code) == (False, "width_not_divisible")
    assert "F=1024 does not divide by the 3 ranks" in found.detail


def test_slices_alone_are_a_block_of_one_rank_and_a_reduce():
    found = form_plan(on_mesh(OLMOE, parse("dp=4,tp=2", H200, tp="tp")), H200)
    assert found.form == "local"
    assert found.local.workload.F == 512
    assert [each.dim for each in found.chosen.predicted.traffic] == ["tp"]
    assert found.chosen.predicted.communication > 0


def test_a_shared_expert_hides_under_the_dispatch():
    plain, beside = (priced("all_to_all", OLMOE.model_copy(update={"shared": S}), "node=2,ep=4") for S in (0, 1024))
    assert (plain.shared, plain.hidden) == (0.0, 0.0)
    assert 0 < beside.hidden == beside.shared
    assert beside.total == pytest.approx(plain.total)
    large = priced("all_to_all", OLMOE.model_copy(update={"shared": 2**17}), "node=2,ep=4")
    assert large.total - plain.total == pytest.approx(large.shared - large.hidden)
    assert 0 < large.hidden < large.shared


def test_ranks_of_a_cpu_hide_nothing():
    work = OLMOE.model_copy(update={"dtype": "float32", "device": "cpu"})
    found = priced("all_to_all", work, "ep=2", CPU)
    assert (found.overlap.chunks, found.overlap.hidden) == (1, 0.0)
    assert "same cores" in found.overlap.reason


def test_parts_add_up_and_training_keeps_what_backward_needs():
    for form in ("all_gather", "all_to_all", "ragged"):
        for train in (False, True):
            found = priced(form, OLMOE.model_copy(update={"train": train}), "ep=8")
            parts = found.compute + found.communication + found.overhead
            assert found.total == pytest.approx(parts)
            assert (found.saved_bytes > 0) == train
    token = 2048 * 2
    kept = priced("all_to_all", OLMOE.model_copy(update={"train": True}), "ep=8").saved_bytes
    assert kept == pytest.approx(ROWS * (2 * token + 3 * 1024 * 2) + ROWS * token), "of the experts, and what came back"


def test_buffers_by_hand():
    token = 2048 * 2
    assert priced("replicated", OLMOE, "ep=8", same_tokens=True).buffer_bytes == 4096 * token
    assert priced("all_gather", OLMOE, "ep=8").buffer_bytes == 8 * 4096 * (2 * token + 8 * 12) + 4096 * token
    exact = priced("all_to_all", OLMOE.model_copy(update={"tokens": 16}), "ep=8")
    assert exact.buffer_bytes == 4 * 16 * 8 * token, "rows there and back, sent and received"


@pytest.mark.parametrize(("P", "E", "K"), [(8, 64, 8), (2, 64, 8), (4, 8, 6), (8, 8, 2)])
def test_worst_buffer_is_exactly_the_most_that_can_arrive(P, E, K):
    """All tokens choose min(K, E/P) experts of one rank."""
    work = on_mesh(OLMOE.model_copy(update={"E": E, "K": K}), mesh(f"ep={P}"))
    most = P * work.tokens * min(K, E // P)
    assert worst_factor(work) * work.R == most
    assert legal("ragged", work).legal
    assert factor(work.model_copy(update={"buffer_factor": 1e9})) == worst_factor(work)


@pytest.mark.parametrize(
    ("form", "changes", "text", "code"),
    [
        ("local", {}, "ep=8", "several_ranks"),
        ("all_to_all", {}, "dp=8,ep=1", "one_rank"),
        ("all_to_all", {}, "ep=128", "experts_not_divisible"),
        ("all_gather", {}, "ep=3", "experts_not_divisible"),
        ("hierarchical", {}, "ep=8", "one_level"),
        ("deduplicated", {}, "node=2,ep=4", "not_built"),
        ("hierarchical", {"same_tokens": True}, "node=1,ep=8", "one_level"),
        ("replicated", {}, "ep=8", "tokens_differ"),
        ("all_to_all", {"same_tokens": True}, "ep=8", "tokens_same"),
        ("ragged", {"buffer_factor": 1.25}, "ep=8", "may_drop"),
        ("hierarchical", {"capacity_factor": 1.0}, "node=2,ep=4", "drops_tokens"),
    ],
)
def test_illegal_forms_say_why(form, changes, text, code):
    work = on_mesh(OLMOE, mesh(text)).model_copy(update=changes)
    assert legal(form, work).code == code
    no_cost = code in ("several_ranks", "one_rank", "experts_not_divisible", "one_level")
    assert (price(form, work, H200) is None) == no_cost


def test_a_spec_that_drops_may_have_a_buffer_that_drops():
    work = OLMOE.model_copy(update={"capacity_factor": 1.25})
    assert legal("ragged", on_mesh(work, mesh("ep=8"), buffer_factor=1.25)).legal


def test_decode_is_replicated_and_training_exchanges():
    work = OLMOE.model_copy(update={"tokens": 1})
    assert choose_form(on_mesh(work, mesh("ep=8"), same_tokens=True), mesh("ep=8"), H200) == "replicated"
    train = OLMOE.model_copy(update={"train": True})
    assert choose_form(train, mesh("ep=8"), H200) == "all_to_all"


def test_a_mesh_that_does_not_divide_the_experts_is_an_error_with_both_numbers():
    with pytest.raises(errors.NoLegalForm, match=r"E=64 .*experts_not_divisible \(E=64 experts.*P=128 ranks"):
        choose_form(OLMOE, mesh("node=16,ep=8"), H200)
    assert form_plan(on_mesh(OLMOE, mesh("node=16,ep=8")), H200).form is None


@pytest.mark.parametrize("same", [False, True])
def test_ranges_tile_the_tokens_with_forms_that_are_nearly_the_best(same):
    work = on_mesh(DEEPSEEK, mesh("node=4,ep=8"), same_tokens=same)
    plans = form_ranges(work, H200, TokenRange(low=1))
    assert (plans[0].tokens.low, plans[-1].tokens.high) == (1, None)
    assert all(a.tokens.high + 1 == b.tokens.low for a, b in itertools.pairwise(plans))
    for T in (1, 2, 7, 64, 1000, 1 << 16):
        chosen = next(p.form for p in plans if T in p.tokens)
        options = form_plan(work.model_copy(update={"tokens": T}), H200).options
        seconds = {o.form: o.predicted.total for o in options if o.legal}
        assert seconds[chosen] <= (1 + planner.TOLERANCE + 1e-3) * min(seconds.values())


def test_a_sweep_has_a_curve_for_every_form_and_none_chosen_where_none_is_legal():
    swept = form_sweep(on_mesh(OLMOE, mesh("ep=8")), H200, (1, 4096))
    assert [curve.lowering for curve in swept.curves] == list(FORMS)
    assert swept.chosen(4096) == "all_to_all"
    assert form_sweep(on_mesh(OLMOE, mesh("ep=3")), H200, (1, 4096)).choices == ()


def test_a_faster_link_is_never_slower():
    totals = []
    for link in ("ethernet", "ib", "pcie5", "nvlink4", "nvlink5"):
        work = on_mesh(OLMOE, mesh("ep=8", links=link))
        totals.append(form_plan(work, H200).chosen.predicted.total)
    assert totals == sorted(totals, reverse=True)


def test_a_plan_is_the_same_after_a_round_trip_through_json():
    found = form_plan(on_mesh(OLMOE, mesh("node=2,ep=4")), H200)
    assert type(found).model_validate_json(found.model_dump_json()) == found
