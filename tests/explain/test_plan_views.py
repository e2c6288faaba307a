"""Text and HTML views of a plan report."""

from __future__ import annotations

import html as stdlib_html
from html.parser import HTMLParser

import expecttest
import pytest
from plan_samples import CAPACITY, WORK, lowered, model, priced, report, skipped, small

from moepass.explain import phrases
from moepass.explain.groups import group
from moepass.explain.report import PlanReport, SitePlan

EXPECTED = """\
moepass plan v1 (compile)   fingerprint <fingerprint>
moepass 0.1.0   torch 2.13.0   hardware H100   device cuda
settings: convert=True, inner=inductor
15 candidates: 12 lowered, 2 skipped, 1 fallback
├── head.moe   moe
│   └── FALLBACK internal_error: KeyError: 'w'
├── model.layers.*.mlp  (x12)   dense_ffn   E=8 K=2 D=64 F=96 gated bfloat16 cuda
│   ├── activation silu(g)*u   init virtual_groups, exact
│   ├── T in [2, 511], infer: dense   estimated 40 us at T = 64   (runner-up grouped: estimated 60 us; estimated margin
│   │   1.50x)
│   │   ├── guard: T <= 511
│   │   ├── slower: gathered estimated 3.1 ms
│   │   └── not possible: capacity: dropless (the spec keeps every token)
│   └── T >= 512, infer: grouped   estimated 1.2 ms at T = 4096   (runner-up dense: estimated 9.6 ms; estimated margin
│       8.00x)
│       ├── guard: T >= 512
│       └── not possible: capacity: dropless (the spec keeps every token)
└── model.layers.*.side  (x2)   dense_ffn
    └── SKIPPED hidden_escapes: mul is also read by sum
        └── hint: keep the hidden tensor inside the block
graph 0: guards T <= 511, cache miss
note: head.moe stays as it was: KeyError
estimates: cost model with the hardware profile H100, random routing, per block; train counts forward and backward
"""

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Collects text and tags, and insists that tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_text_of_a_model_reads_as_intended():
    fingerprint = model().fingerprint
    expecttest.assert_expected_inline(model().to_text().replace(fingerprint, "<fingerprint>"), EXPECTED)


def test_text_of_a_report_without_sites_is_loud():
    assert "!! 0 SITES: no feed-forward block was found" in report().to_text()


def test_text_of_a_report_with_nothing_lowered_is_loud_and_counts_the_reasons():
    text = report(skipped("a"), skipped("b")).to_text()
    assert "!! 0 SITES LOWERED of 2 candidates" in text
    assert "hidden_escapes x2" in text


def test_text_of_a_lowered_report_has_no_alarm():
    assert "!!" not in report(lowered("a", small())).to_text()


def test_text_shows_measured_and_estimated_times_with_their_labels():
    plan = small(measured=55e-6)
    assert "dense   measured 55 us, estimated 40 us" in report(lowered("a", plan)).to_text()


def test_only_what_was_compared_with_others_is_called_the_only_legal_one():
    alone = lowered("a", small().model_copy(update={"alternatives": (small().alternatives[0], CAPACITY)}))
    assert "(the only legal lowering)" in report(alone).to_text()
    given = SitePlan(id="a", kind="moe", status="lowered", lowering="all_to_all", hint="over 2 ranks", workload=WORK)
    assert "only legal" not in report(given).to_text(), "the form of a block in a graph was chosen before"


def test_margin_compares_like_with_like():
    mixed = lowered("a", small(measured=55e-6))
    assert phrases.runner_up(mixed, priced("grouped", 60e-6)).endswith("estimated margin 1.50x")
    assert phrases.runner_up(mixed, priced("grouped", 60e-6, 110e-6)).endswith("measured margin 2.00x")


def test_text_treats_markup_and_control_characters_as_letters():
    text = report(lowered("[bold]evil[/bold]\x1b[31m:smile:", small())).to_text()
    assert "[bold]evil[/bold]\N{REPLACEMENT CHARACTER}[31m:smile:" in text
    assert "\x1b" not in text


def test_text_stays_within_its_width():
    assert max(map(len, model().to_text(width=60).splitlines())) <= 60


def test_text_is_the_same_under_a_colour_terminal(monkeypatch: pytest.MonkeyPatch):
    plain = model().to_text()
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    assert model().to_text() == plain


def test_equal_layers_share_one_label_and_others_are_told_apart():
    sites = [lowered(f"h.{i}.mlp", small()) for i in range(6)]
    assert [g.label for g in group(report(*sites))] == ["h.*.mlp"]
    sites[3] = lowered("h.3.mlp", small(measured=1.0))
    assert [(g.label, len(g.ids)) for g in group(report(*sites))] == [("h.{0-2,4-5}.mlp", 5), ("h.3.mlp", 1)]


def test_grouping_only_stars_the_index_that_varies():
    sites = [lowered(f"blocks.1.layers.{i}.mlp", small()) for i in range(2)]
    assert [g.label for g in group(report(*sites))] == ["blocks.1.layers.*.mlp"]
    grid = [lowered(f"blocks.{i}.layers.{j}.mlp", small()) for i in range(2) for j in range(2)]
    assert [g.label for g in group(report(*grid))] == ["blocks.*.layers.*.mlp"]


def test_grouping_spells_out_shared_sites():
    shared = lowered("a.0", small()).model_copy(update={"shared_by": ("a.1", "a.2")})
    assert group(report(shared))[0].ids == ("a.0", "a.1", "a.2")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0 us"),
        (4.12e-5, "41.2 us"),
        (9.994e-4, "999 us"),
        (9.996e-4, "1 ms"),
        (1.934e-3, "1.93 ms"),
        (2.5, "2.5 s"),
        (12345.6, "12346 s"),
    ],
)
def test_durations_have_three_digits_and_a_fitting_unit(value: float, text: str):
    assert phrases.seconds(value) == text


def test_html_is_well_formed_and_names_every_site():
    text = model().to_html()
    page = Page(text)
    shown = " ".join(page.words)
    for site in model().sites:
        assert site.id in shown
    assert "script" not in page.tags
    assert "://" not in text


def test_html_shows_the_choice_the_alternatives_and_the_reasons():
    shown = " ".join(Page(model().to_html()).words)
    for words in ("estimated 40 us", "not possible:", "dropless", "hidden_escapes", "Hint:", "T >= 512"):
        assert words in shown


def test_html_escapes_hostile_names():
    evil = "<script>alert(1)</script>&\"'"
    site = skipped(evil).model_copy(update={"detail": evil, "hint": evil, "reason": evil})
    hostile = report(site, settings={evil: evil}, notes=(evil,), hardware=evil)
    text = hostile.to_html()
    page = Page(text)
    assert "script" not in page.tags
    assert evil not in text
    assert evil in stdlib_html.unescape(text)


def test_html_of_an_empty_report_is_loud():
    assert "0 SITES" in " ".join(Page(report().to_html()).words)


def test_views_survive_the_json_round_trip():
    again = PlanReport.from_json(model().to_json())
    assert again.to_text() == model().to_text()
    assert again.to_html() == model().to_html()
