"""Prices over token counts, as numbers, tables and charts; the page that shows them."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET

import pytest
from plan_samples import WORK, large, lowered, report, small

from moepass import errors
from moepass.explain import charts, html, sweep_text
from moepass.explain.report import PlanReport
from moepass.lowering.hardware import Hardware
from moepass.lowering.plan import TokenRange, Workload
from moepass.lowering.planner import choose, plan
from moepass.lowering.registry import lowerings
from moepass.lowering.sweep import TOKENS, sweep
from moepass.preview.what_if import sweeps

CPU = Hardware.preset("cpu")
BLOCK = Workload(tokens=0, D=256, F=128, E=16, K=2, n=2)


def test_a_sweep_is_the_planner_at_every_token_count():
    found = sweep(BLOCK, CPU)

    assert found.tokens == TOKENS
    for i, T in enumerate(TOKENS):
        at = plan(BLOCK.model_copy(update={"tokens": T}), TokenRange(low=T, high=T), CPU)
        priced = {a.lowering: a.predicted.total if a.legal else None for a in at.alternatives}
        assert {c.lowering: c.seconds[i] for c in found.curves} == priced
    assert found.chosen(1) == choose(BLOCK.model_copy(update={"tokens": 1}), CPU)
    assert found.choices[0].tokens.low == 1
    assert found.choices[-1].tokens.high is None


def test_the_table_marks_the_choice_and_leaves_out_what_is_never_legal():
    lines = sweep_text.render([sweep(BLOCK, CPU, (1, 4096))]).splitlines()

    assert lines[0] == (
        "E=16 K=2 D=256 F=128 gated float32 cpu, infer, on cpu; random routing (busiest expert 1.0x the mean)"
    )
    assert lines[1].startswith("estimated; chosen: T in [1, ")
    assert "capacity" not in lines[2]
    assert [line.count("*") for line in lines[3:]] == [1, 1]


def test_no_block_is_a_loud_line():
    assert sweep_text.render([]).startswith("0 SITES")


def test_a_model_is_traced_once_for_all_machines_and_routings(tmp_path):
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def net():\n    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))\n"
    )
    found = sweeps(f"{tmp_path}/net.py:net", ["H100", "cpu"], ["random", "skew=2"], (1, 64))

    assert [(s.hardware, s.workload.routing) for s in found] == [
        ("H100", "random"), ("cpu", "random"), ("H100", "skew=2"), ("cpu", "skew=2"),
    ]  # fmt: skip
    assert {s.workload.D for s in found} == {64}
    assert json.loads(sweep_text.to_json(found))[0]["tokens"] == [1, 64]
    with pytest.raises(errors.BadOption, match="zipf"):
        sweeps(f"{tmp_path}/net.py:net", ["H100"], ["zipf"])


# --- charts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [charts.time_chart, charts.roofline])
def test_charts_are_well_formed_alone_and_always_the_same(draw):
    found = sweep(BLOCK, CPU)
    text = draw(found)

    assert text == draw(sweep(BLOCK, CPU))
    root = ET.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert (
        "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"|http://(purl|www\.w3|creativecommons)\.org[^"<]*', "", text).lower()
    )
    words = " ".join(root.itertext())
    assert all(name in words for name in lowerings() if name not in ("capacity", "fused", "fused_recompute"))
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_charts_of_one_page_share_no_id():
    found = sweep(BLOCK, CPU)
    ids = [set(re.findall(r'\bid="([^"]+)"', draw(found))) for draw in (charts.time_chart, charts.roofline)]
    assert not ids[0] & ids[1]
    for draw in (charts.time_chart, charts.roofline):
        text = draw(found)
        used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
        assert used <= set(re.findall(r'\bid="([^"]+)"', text))


def with_sweep() -> PlanReport:
    sites = [lowered(f"layers.{i}.mlp", plan) for i in range(2) for plan in (small(3e-5), large())]
    found = sweep(WORK.model_copy(update={"tokens": 0}), Hardware.preset("H100"))
    return report(*sites).model_copy(update={"sweeps": (found,)})


def test_the_page_draws_the_sweep_of_its_sites():
    page = with_sweep().to_html()

    assert page.count("<svg") == 2
    assert "dense, measured" in page
    assert "Chosen: " in page
    assert PlanReport.from_json(with_sweep().to_json()).to_html() == page


def test_without_matplotlib_the_page_says_how_to_get_charts(monkeypatch):
    monkeypatch.setattr(charts, "available", lambda: False)
    page = html.render(with_sweep())
    assert "<svg" not in page
    assert "pip install &#39;moepass[charts]&#39;" in page


def test_sweeps_are_no_part_of_the_decision():
    bare = with_sweep().model_copy(update={"sweeps": ()})
    assert bare.fingerprint == with_sweep().fingerprint
    assert bare.to_text() == with_sweep().to_text()
    assert with_sweep().merge(with_sweep()).sweeps == with_sweep().sweeps
