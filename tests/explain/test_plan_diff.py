"""Two plans compared: decisions count, prices stand beside them, ranges need not have the same borders."""

from __future__ import annotations

import json

import pytest
from plan_samples import WORK, large, lowered, model, report, skipped, small

from moepass.explain import diff_text
from moepass.explain.diff import diff
from moepass.explain.report import PlanReport
from moepass.lowering.plan import Plan, TokenRange


def over(plan: Plan, low: int, high: int | None, lowering: str | None = None) -> Plan:
    chosen = lowering or plan.lowering
    return plan.model_copy(update={"tokens": TokenRange(low=low, high=high), "lowering": chosen})


def test_a_report_equals_itself_and_its_copy_from_json():
    found = diff(model(), PlanReport.from_json(model().to_json()))

    assert found.same
    assert (found.setting, found.sites) == ((), ())
    assert diff_text.render(found).splitlines()[-1] == "same decisions at all 15 sites"


def test_prices_alone_are_no_difference():
    dear = small(measured=5e-3)
    assert diff(report(lowered("mlp", small())), report(lowered("mlp", dear))).same


def test_a_moved_border_is_one_change_over_the_tokens_between():
    before = report(lowered("mlp", small()), lowered("mlp", large()))
    after = report(lowered("mlp", over(small(), 2, 63)), lowered("mlp", over(large(), 64, None)))

    (change,) = diff(before, after).sites

    assert (change.id, change.what, change.tokens) == ("mlp", "changed", TokenRange(low=64, high=511))
    assert [(f.field, f.before, f.after) for f in change.fields] == [("lowering", "dense", "grouped")]
    assert change.times is None  # priced at T=64 and at T=4096: not comparable


def test_times_of_one_kind_at_one_token_count_stand_beside_a_change():
    after = over(small(), 2, 511, "grouped")
    (change,) = diff(report(lowered("mlp", small())), report(lowered("mlp", after))).sites

    assert change.times is not None
    assert (change.times.label, change.times.before, change.times.after) == ("estimated", 40e-6, 60e-6)


def test_sites_that_only_one_side_has_and_blocks_that_were_given_up():
    before = report(lowered("a", small()), lowered("b", small()))
    after = report(lowered("a", small()), lowered("c", small()), skipped("b"))

    found = diff(before, after)

    # b is planned for T and mode before, and left alone whatever T after: two entries of one name
    assert {(s.id, s.what) for s in found.sites} == {("b", "removed"), ("b", "added"), ("c", "added")}
    assert found.unchanged == 1


def test_other_machines_and_shapes_are_named():
    wide = small().model_copy(update={"workload": WORK.model_copy(update={"F": 128})})
    found = diff(
        report(lowered("mlp", small())), report(lowered("mlp", wide), hardware="H200", settings={"inner": "eager"})
    )

    assert [(c.field, c.before, c.after) for c in found.setting] == [
        ("hardware", "H100", "H200"),
        ("inner", None, "eager"),
    ]
    assert [(f.field, f.before, f.after) for f in found.sites[0].fields] == [("F", 96, 128)]


def test_text_joins_layers_that_changed_alike():
    before = report(*(lowered(f"layers.{i}.mlp", small()) for i in range(4)))
    after = report(*(lowered(f"layers.{i}.mlp", over(small(), 2, 511, "grouped")) for i in range(4)), hardware="H200")

    assert diff_text.render(diff(before, after)).splitlines()[1:] == [
        "  hardware: H100 -> H200",
        "4 sites decided otherwise, 0 as before",
        "  layers.*.mlp, T in [2, 511], infer: dense -> grouped   (estimated 40 us -> 60 us, 1.50x)",
    ]


def test_json_says_whether_they_are_the_same():
    same = json.loads(diff(model(), model()).to_json())
    assert same["same"] is True
    other = json.loads(diff(model(3), model(4)).to_json())
    assert other["same"] is False
    assert {site["what"] for site in other["sites"]} == {"added"}


@pytest.mark.parametrize("layers", [(0, 1), (2, 12)])
def test_a_difference_seen_from_the_other_side_is_its_mirror(layers):
    a, b = (model(n) for n in layers)
    there, back = diff(a, b), diff(b, a)
    mirror = {"added": "removed", "removed": "added", "changed": "changed"}
    assert [(s.id, s.tokens, mirror[s.what]) for s in there.sites] == [(s.id, s.tokens, s.what) for s in back.sites]
