"""The scaling benchmark: rows that follow from the cost model, a chart, and a comparison between real processes."""

from __future__ import annotations

import pytest

from benchmarks import ep_scaling
from benchmarks.ep import measured, steps
from moepass.lowering.hardware import Hardware
from moepass.lowering.plan import Workload

BLOCK = Workload(tokens=0, D=2048, F=1024, E=64, K=8, n=2, dtype="bfloat16", device="meta")


@pytest.fixture(scope="module")
def rows():
    return ep_scaling.predicted("olmoe", BLOCK, Hardware.preset("H200"), 4096, train=True)


def test_a_model_scales_as_far_as_its_experts_divide(rows):
    assert [row["P"] for row in rows] == [1, 2, 4, 8, 16, 32, 64]
    assert (rows[0]["form"], rows[0]["links [ms]"], rows[0]["relative throughput"]) == ("local", 0.0, 1.0)


def test_nodes_are_of_eight_ranks_and_their_links_slow_what_crosses_them(rows):
    assert [ep_scaling.mesh_text(P) for P in (1, 8, 16, 512)] == ["ep=1", "ep=8", "node=2,ep=8", "node=64,ep=8"]
    by = {row["P"]: row for row in rows}
    assert by[16]["links [ms]"] > 2 * by[8]["links [ms]"]
    assert by[16]["relative throughput"] < by[8]["relative throughput"] < 1.5


def test_weights_of_a_rank_shrink_with_the_ranks(rows):
    assert [row["experts of a rank [GB]"] * row["P"] for row in rows] == [rows[0]["experts of a rank [GB]"]] * 7


def test_the_chart_is_written(rows, tmp_path):
    pytest.importorskip("matplotlib", reason="the chart is drawn by matplotlib (moepass[charts])")
    assert ep_scaling.chart(rows, tmp_path / "chart.svg", "title")
    assert "olmoe" in (tmp_path / "chart.svg").read_text()


def test_the_error_of_a_prediction_is_said_in_factors():
    told = ep_scaling.error([{"measured over predicted": ratio} for ratio in (0.5, 1.0, 4.0)])
    assert "median factor 2.00, worst 4.00" in told
    assert "from 0.50 to 4.00 over 3 points" in told


@pytest.mark.parametrize("form", ["local", *measured.FORMS])
def test_every_timed_form_has_a_prediction_of_the_same_workload(form):
    from moepass.lowering.links import PRESETS
    from moepass.lowering.mesh import MeshDim, MeshSpec

    ranks = 1 if form == "local" else 2
    mesh = MeshSpec(dims=(MeshDim(name="ep", size=ranks, link=PRESETS["gloo"]),), ep=("ep",))
    row = measured._row(form, Workload(tokens=16, **measured.SHAPE), mesh, Hardware.preset("cpu"), 0.5)
    assert (row["P"], row["form"], row["measured [ms]"]) == (ranks, form, 500.0)
    assert row["measured over predicted"] == pytest.approx(500.0 / row["predicted [ms]"])


def test_forms_that_are_slower_compiled_are_named():
    rows = [{"form": "replicated", "eager over compiled": 1.2}, {"form": "all_to_all", "eager over compiled": 0.9}]
    said = "slower compiled than eager: all_to_all; eager over compiled from 0.90 to 1.20"
    assert steps.summary(rows) == said
    assert steps.summary(rows[:1]).startswith("no form is slower compiled than eager")
