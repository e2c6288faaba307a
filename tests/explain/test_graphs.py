"""Graphs before and after: tidied source, the places of change, and where they are kept."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import moepass
from moepass import cli, errors
from moepass.explain.graphs import changes, tidy
from moepass.explain.report import PlanReport


def dense(device: str = "cpu") -> nn.Module:
    torch._dynamo.reset()
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)).to(device)


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("# File: /home/me/.venv/lib/python3.11/site-packages/torch/nn/x.py:3 in f", "# File: torch/nn/x.py:3 in f"),
        ("# File: /home/me/work/model.py:3 in f", "# File: model.py:3 in f"),
        ("a = relu(x);  x = y = None", "a = relu(x)"),
        ("a = relu(x);  x = None  # noqa", "a = relu(x)  # noqa"),
        ("mm(l_self_modules_layers_modules_0_parameters_weight_, x)", "mm(self.layers.0.weight, x)"),
        ("only = tail", "only = tail"),
        ("x = L_x_\nl_x_ = L_x_\ny = 1", "x = L_x_\ny = 1"),
        (
            'def forward(self, L_x_: "f32[s7, 4]", L_self_parameters_w_: "f32[4]"):\n    self.w = L_self_parameters_w_',
            'def forward(\n        self,\n        L_x_: "f32[s7, 4]",\n        self.w: "f32[4]",\n):',
        ),
    ],
)
def test_source_is_shown_without_what_only_a_machine_wants(source, shown):
    assert tidy(source) == shown


def test_changes_are_the_places_that_differ_with_a_little_around():
    before = "\n".join(f"line {i}" for i in range(40))
    after = before.replace("line 5\n", "new 5\nnew 6\n").replace("line 30\n", "")
    first, second = changes(before, after)
    assert (first.size, second.size) == ((1, 2), (1, 0))
    assert [kind for kind, _ in first.lines] == [" ", " ", "-", "+", "+", " ", " "]
    assert changes(before, before + "\n\n") == ()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_graphs_are_kept_where_they_are_asked_for(device):
    model, x_TD = dense(device), torch.empty(12, 16, device=device)
    (graph,) = moepass.explain(model, graphs=True)(x_TD).graphs
    (change,) = changes(graph.before, graph.after)
    gone, come = ("\n".join(line for kind, line in change.lines if kind == wanted) for wanted in "-+")
    assert "gelu" in gone
    assert all(f"moepass_0_{i}: " in come for i in range(5)), "router, w_in, w_out and two biases are new inputs"
    assert "moepass.router_logits" in come
    assert "moepass.experts_" in come
    assert "/site-packages/" not in graph.before
    (bare,) = moepass.explain(model)(x_TD).graphs
    assert (bare.before, bare.after) == (None, None)
    with pytest.raises(errors.NoState):
        list(moepass.moe_parameters(model))


def test_graphs_do_not_change_the_fingerprint_and_survive_json():
    model, x_TD = dense(), torch.randn(12, 16)
    shown = moepass.explain(model, graphs=True)(x_TD)
    assert shown.fingerprint == moepass.explain(model)(x_TD).fingerprint
    assert PlanReport.from_json(shown.to_json()) == shown


def test_a_conversion_that_needs_the_weights_leaves_the_graph_after_out(monkeypatch):
    def fails(*args: object) -> None:
        raise NotImplementedError("Cannot copy out of meta tensor; no data!")

    monkeypatch.setattr("moepass.preview.analyze.rewrite", fails)
    report = moepass.explain(dense("meta"), graphs=True)(torch.empty(12, 16, device="meta"))
    (graph,) = report.graphs
    assert graph.before is not None
    assert graph.after is None
    assert "cannot be shown without" in report.to_html()
    with pytest.raises(Exception, match="no data"):
        moepass.explain(dense(), analyze=True)(torch.randn(12, 16))


def test_the_page_has_them_and_json_does_not(tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))\n"
    )
    arguments = ["explain", f"{tmp_path}/net.py:net", "--tokens", "4,64", "--format"]
    page = CliRunner().invoke(cli.app, [*arguments, "html"]).stdout
    assert "Graph before and after" in page
    assert page.count("it changes at 1 place.") == 1, "one graph, however many token counts"
    plan = json.loads(CliRunner().invoke(cli.app, [*arguments, "json"]).stdout)
    assert plan["graphs"][0]["before"] is None
