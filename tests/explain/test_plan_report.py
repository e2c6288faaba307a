"""PlanReport: canonical content, counts, fingerprint, JSON, merging."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import pytest
from plan_samples import WORK, failed, large, lowered, model, report, skipped, small
from pydantic import ValidationError

from moepass import errors
from moepass.explain import schema
from moepass.explain.report import KernelSource, SitePlan
from moepass.lowering.plan import Price, TokenRange


def test_summary_counts_each_site_once_however_many_ranges_it_has():
    assert model().summary == {"candidates": 15, "lowered": 12, "skipped": 2, "fallback": 1}


def test_a_site_that_fails_in_one_range_counts_as_fallback():
    half = failed("a").model_copy(update={"tokens": TokenRange(low=512)})
    assert report(lowered("a", small()), half).summary == {"candidates": 1, "lowered": 0, "skipped": 0, "fallback": 1}


def test_shared_sites_are_counted():
    shared = lowered("a.0", small()).model_copy(update={"shared_by": ("a.1", "a.2")})
    assert report(shared).summary["lowered"] == 3


def test_sites_are_in_natural_order_whatever_order_they_came_in():
    sites = list(model().sites)
    random.Random(0).shuffle(sites)
    assert report(*sites).sites == model().sites
    assert [s.id for s in model().sites if s.status == "lowered"][4:6] == ["model.layers.2.mlp"] * 2
    assert [s.id for s in model().sites][-1] == "model.layers.11.mlp"


def test_from_plan_takes_times_and_alternatives_from_the_plan():
    site = lowered("a", small(measured=55e-6))
    assert (site.lowering, site.tokens, site.workload) == ("dense", TokenRange(low=2, high=511), WORK)
    assert site.predicted == pytest.approx(40e-6)
    assert site.measured == 55e-6
    assert [a.lowering for a in site.alternatives] == ["dense", "grouped", "gathered", "capacity"]


def test_a_site_that_was_not_lowered_needs_a_reason():
    with pytest.raises(ValidationError, match="reason"):
        SitePlan(id="a", kind="moe", status="skipped")
    with pytest.raises(ValidationError, match="lowering"):
        SitePlan(id="a", kind="moe", status="lowered")


def test_json_round_trip_gives_an_equal_report():
    again = type(model()).from_json(model().to_json())
    assert again == model()
    assert again.to_json() == model().to_json()


def test_json_holds_the_derived_values():
    data = json.loads(model().to_json())
    assert data["fingerprint"] == model().fingerprint
    assert data["summary"] == model().summary
    first = next(s for s in data["sites"] if s["status"] == "lowered")
    assert first["alternatives"][0]["predicted"]["total"] == pytest.approx(40e-6)
    assert first["alternatives"][-1]["reason"] == "dropless"


def test_json_follows_the_shipped_schema():
    shipped = json.loads(schema.PATH.read_text())
    assert shipped == json.loads(json.dumps(schema.schema())), "run python -m moepass.explain.schema"
    data = json.loads(model().to_json())
    assert set(data) == set(shipped["properties"])
    assert set(data["sites"][0]) == set(shipped["$defs"]["SitePlan"]["properties"])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("not json", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "schema_version"),
        ("{}", "schema_version"),
        ('{"schema_version": "2.0", "hardware": "a", "device": "cpu"}', "2.0"),
        ('{"schema_version": "1.0", "hardware": "a", "device": "cpu", "sites": [{"id": 3}]}', r"sites\.0\.id"),
        ('{"schema_version": "1.0", "hardware": "a", "device": "cpu", "sites": 7}', "sites"),
        ('{"schema_version": "1.0", "hardware": "a", "device": "cpu", "colour": 1}', "colour"),
        (b"\xff\xfe\x00", "not JSON"),
    ],
)
def test_garbage_is_refused_with_what_is_wrong(text: str, complaint: str):
    with pytest.raises(errors.BadReport, match=complaint) as caught:
        type(model()).from_json(text)
    assert "moepass explain" in str(caught.value)
    assert isinstance(caught.value, errors.PlanMismatch)


def test_a_range_of_tokens_that_ends_before_it_begins_is_refused():
    """Found by fuzzing: such a plan was read, and comparing it failed."""
    data = json.loads(model().to_json())
    data["sites"][0]["tokens"] = {"low": 6, "high": 5}
    with pytest.raises(errors.BadReport, match="ends at 5, before it begins at 6"):
        type(model()).from_json(json.dumps(data))


def test_equal_decisions_have_equal_fingerprints():
    assert model().fingerprint == model().fingerprint
    assert len(model().fingerprint) == 16


@pytest.mark.parametrize(
    "change",
    [
        {"notes": ("something else",)},
        {"torch_version": "9.9"},
        {"kind": "explain"},
        {"graphs": ()},
    ],
)
def test_fingerprint_ignores_what_is_not_a_decision(change: dict[str, object]):
    assert model().model_copy(update=change).fingerprint == model().fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"hardware": "A100"},
        {"device": "cpu"},
        {"settings": {"inner": "eager"}},
        {"moepass_version": "9"},
        {"sites": ()},
    ],
)
def test_fingerprint_changes_with_what_influences_the_plan(change: dict[str, object]):
    assert model().model_copy(update=change).fingerprint != model().fingerprint


def test_fingerprint_ignores_times_and_the_order_they_imply():
    estimated, measured = small(), small(measured=7.0)
    reordered = measured.model_copy(update={"alternatives": measured.alternatives[::-1]})
    slower = tuple(a.model_copy(update={"predicted": Price(compute=9.0)}) for a in estimated.alternatives)
    repriced = estimated.model_copy(update={"alternatives": slower, "decided_by": "measurement"})
    prints = {report(lowered("a", p)).fingerprint for p in (estimated, measured, reordered, repriced)}
    assert len(prints) == 1


def test_fingerprint_ignores_the_example_token_count_inside_a_range():
    other = small().model_copy(update={"workload": WORK.model_copy(update={"tokens": 65})})
    assert report(lowered("a", other)).fingerprint == report(lowered("a", small())).fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"lowering": "grouped"},
        {"tokens": TokenRange(low=2, high=600)},
        {"workload": WORK.model_copy(update={"E": 16})},
        {"activation": "gelu(g)"},
        {"guard": "T <= 511"},
        {"id": "b"},
        {"init": "copy, exact"},
    ],
)
def test_fingerprint_changes_with_each_part_of_a_decision(change: dict[str, object]):
    site = lowered("a", small())
    assert report(site.model_copy(update=change)).fingerprint != report(site).fingerprint


def test_fingerprint_is_the_same_for_shared_and_for_listed_sites():
    shared = lowered("a.0", small()).model_copy(update={"shared_by": ("a.1",)})
    listed = report(lowered("a.0", small()), lowered("a.1", small()))
    assert report(shared).fingerprint == listed.fingerprint


def test_fingerprint_is_the_same_in_another_process():
    code = "import sys; from moepass.explain.report import PlanReport; r = PlanReport.from_json(sys.stdin.read())"
    code += "; print(r.fingerprint)"
    for seed in ("1", "2"):
        child = subprocess.run(
            [sys.executable, "-c", code],
            input=model().to_json(),
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert child.stdout.strip() == model().fingerprint


def test_merge_of_two_ranges_keeps_both():
    merged = report(lowered("a", small())).merge(report(lowered("a", large())))
    assert [s.lowering for s in merged.sites] == ["dense", "grouped"]
    assert merged.summary["candidates"] == 1


def test_merge_takes_the_newer_entry_for_the_same_site_and_range():
    merged = report(lowered("a", small())).merge(report(lowered("a", small(measured=1.0))))
    assert [s.measured for s in merged.sites] == [1.0]


def test_merge_keeps_training_and_inference_apart():
    train = small().model_copy(update={"workload": WORK.model_copy(update={"train": True})})
    assert len(report(lowered("a", small())).merge(report(lowered("a", train))).sites) == 2


def test_merge_joins_notes_graphs_and_settings():
    one = model()
    two = report(skipped("z"), settings={"inner": "inductor", "train": True}, notes=("b", "a"), device="cpu")
    merged = one.merge(two)
    assert merged.notes == ("a", "b", "head.moe stays as it was: KeyError")
    assert merged.settings == {"convert": True, "inner": "inductor", "train": True}
    assert merged.device == "cpu+cuda"
    assert one.merge(one) == one


def test_merge_keeps_the_kernels_of_both():
    kernels = [KernelSource(name=name, site="a", target="sm_90", source="", tile="M=16") for name in ("up", "down")]
    one, two = (report(lowered("a", small()), kernels=(kernel,)) for kernel in kernels)
    assert one.merge(two).merge(one).kernels == tuple(kernels)


@pytest.mark.parametrize("change", [{"hardware": "A100"}, {"settings": {"inner": "eager"}}, {"moepass_version": "9"}])
def test_merge_refuses_reports_of_different_configurations(change: dict[str, object]):
    with pytest.raises(errors.CannotMerge, match=r"hardware|inner|moepass version"):
        model().merge(model().model_copy(update=change))


def test_site_finds_the_entry_for_a_token_count():
    assert model().site("model.layers.3.mlp").lowering == "dense"
    assert model().site("model.layers.3.mlp", tokens=511).lowering == "dense"
    assert model().site("model.layers.3.mlp", tokens=512).lowering == "grouped"


def test_site_names_the_nearest_site_when_there_is_none():
    with pytest.raises(errors.NoSuchSite, match=r"did you mean 'head\.moe'"):
        model().site("head.mo")
    with pytest.raises(errors.NoSuchSite, match="T = 1;"):
        model().site("model.layers.3.mlp", tokens=1)
