"""``explain(analyze=True)``: what is measured, counted against code not ours, and kept apart from the plan."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import moepass
from moepass import _compat, errors
from moepass.explain.analysis import Analysis, SiteAnalysis, Timing
from moepass.explain.report import PlanReport
from moepass.lowering import machine
from moepass.lowering.hardware import Hardware
from moepass.lowering.measure import operands
from moepass.lowering.plan import Workload
from moepass.preview import analyze, probe
from moepass.spec import DispatchSpec, ExpertSpec, MoESpec, RouterSpec
from tests import moe_zoo


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def dense() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))


def moe(**dispatch: object) -> nn.Module:
    torch.manual_seed(0)
    spec = MoESpec(
        router=RouterSpec(top_k=2),
        experts=ExpertSpec(num_experts=4, intermediate_size=24, activation="swiglu"),
        dispatch=DispatchSpec(**dispatch),
    )
    block = spec.build(16)
    nn.init.normal_(block.router.weight)
    return block.eval()


@pytest.fixture(scope="module")
def olmoe() -> tuple[nn.Module, dict[str, torch.Tensor], PlanReport]:
    """A model of transformers, its inputs, and its analysis."""
    torch._dynamo.reset()
    model = moe_zoo.build("olmoe")
    model.config.use_cache = False
    given = moe_zoo.inputs("olmoe", 33)
    with torch.no_grad():
        return model, given, moepass.explain(model, analyze=True)(**given)


def test_loads_are_those_that_transformers_own_router_gives(olmoe):
    model, given, report = olmoe
    with torch.no_grad():
        logits = model(**given, output_router_logits=True).router_logits
    for site, logits_TE in zip(report.analysis.sites, logits, strict=True):
        expected = torch.bincount(logits_TE.topk(moe_zoo.K).indices.reshape(-1), minlength=moe_zoo.EXPERTS)
        assert site.load == tuple(expected.tolist())
        assert (site.tokens, site.calls, site.dropped, site.unrouted) == (33, 1, 0, 0)


def test_the_plan_is_that_of_an_estimate_and_so_is_its_fingerprint(olmoe):
    model, given, report = olmoe
    with torch.no_grad():
        estimated = moepass.explain(model)(**given)
    assert (estimated.kind, report.kind) == ("explain", "analyze")
    assert estimated.analysis is None
    assert report.sites == estimated.sites
    assert report.fingerprint == estimated.fingerprint
    assert all(site.measured is None for site in report.sites), "what decided nothing is not in the decision"


def test_every_candidate_is_timed_beside_its_estimate(olmoe):
    _, _, report = olmoe
    for entry, site in zip(report.sites, report.analysis.sites, strict=True):
        assert site.id == site.timed_as == entry.id
        assert entry.lowering in {t.lowering for t in site.timings}
        assert {t.lowering for t in site.timings} <= {a.lowering for a in entry.alternatives if a.legal}
        for timing in site.timings:
            assert 0 < timing.fastest <= timing.seconds <= timing.slowest
            assert timing.runs == probe.REPEATS
            assert timing.peak_bytes > 33 * moe_zoo.D * 4, "the output alone is that large"
        seconds = [t.seconds for t in site.timings]
        assert seconds == sorted(seconds)


def test_an_analysis_survives_json_and_says_how_it_was_made(olmoe):
    _, _, report = olmoe
    assert PlanReport.from_json(report.to_json()) == report
    assert report.analysis.machine == machine.describe("cpu")
    assert report.analysis.source == "the model's own weights and the given inputs"


def test_an_analysed_report_is_pinned_like_any_other(olmoe, tmp_path):
    model, given, report = olmoe
    path = tmp_path / "plan.json"
    path.write_text(report.to_json())
    with torch.no_grad():
        out = torch.compile(model, backend="moepass", options={"plan": str(path), "inner": "eager", "strict": True})(
            **given
        )
        assert_close(out.logits, model(**given).logits, rtol=1e-4, atol=1e-4)
    replayed = moepass.last_plan()
    assert {(s.id, s.lowering, s.decided_by) for s in replayed.sites} == {
        (s.id, s.lowering, "pin") for s in report.sites
    }


def test_a_dense_block_is_analysed_and_nothing_stays_attached():
    model = dense()
    report = moepass.explain(model, analyze=True)(torch.randn(12, 16))
    (site,) = report.analysis.sites
    assert (site.train, sum(site.load)) == (True, 12 * 2)
    with pytest.raises(errors.NoState):
        list(moepass.moe_parameters(model))


def test_a_capacity_drops_and_pads_by_what_the_routing_says():
    block, x_TD = moe(capacity_factor=1.0), torch.randn(30, 16)
    block.record_metrics()
    with torch.no_grad():
        block(x_TD)
        metrics = block.metrics()
        block.record_metrics(False)
        (site,) = moepass.explain(block, analyze=True)(x_TD).analysis.sites
    assert site.load == tuple(metrics.tokens_per_expert.tolist())
    assert site.dropped == int(metrics.dropped_tokens) > 0
    assert {t.lowering: t.padding_rows for t in site.timings} == {"capacity": int(metrics.padding_rows)}


def test_dense_pads_to_all_experts_and_grouped_not_at_all():
    with torch.no_grad():
        (site,) = moepass.explain(moe(), analyze=True)(torch.randn(30, 16)).analysis.sites
    padding = {t.lowering: t.padding_rows for t in site.timings}
    assert padding["dense"] == 30 * 4 - 30 * 2
    assert padding["grouped"] == 0


def test_a_block_that_is_called_twice_counts_both_calls():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = moe()

        def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
            once = self.block(x_TD)
            torch._dynamo.graph_break()
            return self.block(once)

    with torch.no_grad():
        sites = moepass.explain(Twice(), analyze=True)(torch.randn(9, 16)).analysis.sites
    assert sum(s.calls for s in sites) == 2
    assert sum(sum(s.load) for s in sites) == 2 * 9 * 2


def test_on_the_meta_device_the_blocks_run_alone_and_the_report_says_so():
    model = dense().to("meta")
    with torch.no_grad():
        report = moepass.explain(model, analyze=True, routing="balanced", tokens=(4, 16))(
            torch.empty(16, 16, device="meta")
        )
    assert [(s.tokens, set(s.load)) for s in report.analysis.sites] == [(4, {1}), (16, {4})]
    assert all(s.timings for s in report.analysis.sites)
    assert "drawn at random (balanced routing); no weights were read" in report.analysis.source


def test_a_block_that_does_not_fit_is_left_alone_with_the_reason(monkeypatch):
    monkeypatch.setattr(machine, "free_bytes", lambda device: 1000)
    report = moepass.explain(dense().to("meta"), analyze=True)(torch.empty(16, 16, device="meta"))
    (site,) = report.analysis.sites
    assert (site.timings, site.load) == ((), ())
    assert "GiB are free here" in site.skipped
    assert "nothing was measured" in report.to_text()


def test_a_plan_for_another_kind_of_device_is_not_measured_here():
    for device in ("cpu", "meta"):
        with pytest.raises(errors.BadOption, match="the plan is for H100, a cuda device") as caught:
            moepass.explain(dense().to(device), analyze=True, hardware="H100")(torch.empty(4, 16, device=device))
        assert "leave out hardware" in str(caught.value)


def test_an_analysis_takes_its_tokens_from_the_arguments():
    with pytest.raises(errors.BadOption, match="call it with arguments of that many tokens"):
        moepass.explain(dense(), analyze=True, tokens=(4,))(torch.randn(4, 16))


def test_layers_of_one_kind_share_timings_when_time_is_up(monkeypatch):
    monkeypatch.setattr(probe, "BUDGET", -1.0)
    model = nn.Sequential(moe(), moe())
    with torch.no_grad():
        report = moepass.explain(model, analyze=True)(torch.randn(9, 16))
    first, second = report.analysis.sites
    assert (first.timed_as, second.timed_as, second.timings) == (first.id, first.id, ())
    assert second.load, "the routing is counted all the same"
    assert report.analysis.timings([second.id], 9, False) == first.timings


def test_text_shows_both_kinds_of_numbers_with_their_names(olmoe):
    text = " ".join(olmoe[2].to_text(width=400).split())
    for words in ("estimated", "at T = 33", "of its estimate", "measured regret", "busiest expert", "peak"):
        assert words in text
    assert "medians of eager runs on" in text
    assert "load average" in text


def test_a_merge_keeps_both_token_counts():
    one, two = (
        Analysis(source="here", sites=(SiteAnalysis(id="a", tokens=T, load=(T, 0), timed_as="a"),)) for T in (1, 8)
    )
    merged = one.merge(two)
    assert [s.tokens for s in merged.sites] == [1, 8]
    assert merged.merge(two) == merged
    assert merged.sites[1].imbalance == 2.0
    assert merged.sites[1].idle == 1


def test_medians_are_taken_over_the_sites_that_were_timed():
    def site(id: str, seconds: float) -> SiteAnalysis:
        timing = Timing(lowering="dense", seconds=seconds, fastest=seconds, slowest=seconds, runs=5, peak_bytes=10)
        broken = Timing(lowering="grouped", failed="out of memory")
        return SiteAnalysis(id=id, tokens=4, timed_as=id, timings=(timing, broken))

    shared = SiteAnalysis(id="d", tokens=4, timed_as="a")
    analysis = Analysis(source="here", sites=(site("a", 1.0), site("b", 2.0), site("c", 9.0), shared))
    dense_, grouped = analysis.timings("abcd", 4, False)
    assert (dense_.seconds, dense_.fastest, dense_.slowest, dense_.runs) == (2.0, 1.0, 9.0, 15)
    assert (grouped.seconds, grouped.failed) == (None, "out of memory")


def test_peak_bytes_counts_what_is_held_at_the_same_time():
    def step() -> None:
        a = torch.zeros(1 << 16)  # 256 KiB
        b = a * 2
        del a
        b += 1

    assert _compat.peak_bytes(step, "cpu") == pytest.approx(2 * (1 << 18), abs=1024)


@pytest.mark.parametrize("routing", ["random", "balanced", "skew=2"])
def test_drawn_routings_are_what_prices_assume(routing):
    work = Workload(tokens=4000, D=1, F=1, E=16, K=2, n=1, routing=routing)
    load, unrouted, dropped = probe.count(operands(work)[1], work)
    assert (sum(load), unrouted, dropped) == (8000, 0, 0)
    from moepass.lowering import routing as spread

    assert max(load) / (8000 / 16) == pytest.approx(spread.heaviest(16, 2, routing), rel=0.1)


def test_a_profile_of_an_absent_accelerator_is_refused():
    if torch.accelerator.is_available():
        pytest.skip("there is an accelerator here")
    with pytest.raises(errors.BadOption, match="H200"):
        analyze.here(Hardware.preset("H200"))
