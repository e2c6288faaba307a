"""``moepass explain --mesh`` and ``moepass sweep --mesh``: every form priced and shown, and clear refusals."""

from __future__ import annotations

import json

import pytest
from torch import nn
from typer.testing import CliRunner, Result

import moepass
from moepass import cli, errors
from moepass.explain import forms
from moepass.explain.diff import diff
from moepass.explain.report import PlanReport
from moepass.lowering.hardware import Hardware
from moepass.lowering.plan import Workload
from moepass.preview.mesh import Spread, over_ranks

runner = CliRunner()


def run(*args: object) -> Result:
    return runner.invoke(cli.app, [str(a) for a in args])


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A block that becomes E=8, K=2."""
    path = tmp_path_factory.mktemp("models") / "mesh_net.py"
    path.write_text(
        "from torch import nn\n"
        "def net():\n    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))\n"
    )
    return f"{path}:net"


@pytest.fixture(scope="module")
def text(net: str) -> str:
    return run("explain", net, "--hardware", "h200", "--tokens", "16384", "--mesh", "node=2,ep=4", "--train").stdout


@pytest.fixture(scope="module")
def report(net: str) -> PlanReport:
    asked = ("--hardware", "h200", "--tokens", "16384", "--mesh", "node=2,ep=4", "--train", "--format", "json")
    return PlanReport.from_json(run("explain", net, *asked).stdout)


def test_text_names_the_chosen_form_its_volumes_memory_and_the_links(text):
    for words in (
        "T = 16384, train: all_to_all",
        "runner-up hierarchical",
        "T = 16384 tokens of each rank, 131072 of 8 EP ranks",
        "sent by a rank over node (ib-ndr): dispatch 4.19 MB, combine 4.19 MB, backward 8.39 MB",
        "sent by a rank over ep (nvlink4): dispatch 3.15 MB, combine 3.15 MB, backward 6.29 MB",
        "of buffers, 59.1 MB saved for backward",
        "not possible: replicated: tokens_differ",
        "ib-ndr 45 GB/s and 10 us a step (preset)",
    ):
        assert words in " ".join(text.split()), words


def test_volumes_in_the_report_are_the_lower_bound(report):
    """R = T*K rows of 64 float32 values; half of them to the other node, 3/8 to others of the same."""
    plan = report.sites[0].ep
    rows = 16384 * 2 * 64 * 4
    assert [(t.dim, t.dispatch) for t in plan.chosen.predicted.traffic] == [("node", rows / 2), ("ep", rows * 3 / 8)]
    assert report.sites[0].workload.mesh.P == 8


def test_report_survives_json_and_its_fingerprint_knows_the_form(report, net):
    assert PlanReport.from_json(report.to_json()) == report
    entry = report.sites[0]
    other = entry.model_copy(update={"ep": entry.ep.model_copy(update={"form": "hierarchical"})})
    changed = report.model_copy(update={"sites": (other,)})
    assert changed.fingerprint != report.fingerprint
    found = diff(report, changed)
    assert [(f.field, f.before, f.after) for f in found.sites[0].fields] == [("form", "all_to_all", "hierarchical")]


def test_decode_and_small_buffers_have_their_options(net):
    asked = ("--hardware", "h200", "--tokens", "1", "--mesh", "ep=8")
    assert "T = 1, infer: replicated" in run("explain", net, *asked, "--same-tokens").stdout
    assert "ragged: may_drop" in run("explain", net, *asked, "--buffer-factor", "1.25").stdout


def test_experts_that_do_not_divide_are_loud_and_named(net):
    found = run("explain", net, "--hardware", "h200", "--tokens", "64", "--mesh", "node=16,ep=8")
    assert found.exit_code == 0
    words = " ".join(found.stdout.split())
    assert "NO FORM is possible on this mesh" in words
    assert "no expert-parallel form can spread E=8 experts over P=128 ranks" in words
    some = run("explain", net, "--hardware", "h200", "--tokens", "64", "--mesh", "node=16,ep=8", "--ep", "ep")
    assert "experts over ep: P = 8" in " ".join(some.stdout.split())
    assert "T = 64, infer: all_" in some.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--mesh", "ep=0"), "ep=0 is no size; give a whole number"),
        (("--mesh", "dp=2"), "say which do: --ep with one of dp"),
        (("--mesh", "ep=2", "--link", "nvlnk"), "did you mean 'nvlink'?"),
        (("--mesh", "ep=2", "--buffer-factor", "0"), "give a number above 0"),
        (("--mesh", "ep=2", "--analyze"), "leave one out"),
        (("--ep", "ep"), "give --mesh too"),
        (("--same-tokens",), "give --mesh too"),
    ],
)
def test_bad_options_are_one_line_and_nothing_is_traced(net, options, words):
    found = run("explain", net, *options)
    assert (found.exit_code, found.stdout) == (2, "")
    assert words in found.stderr
    assert "Traceback" not in found.stderr


def test_sweep_has_a_table_for_every_mesh(net, tmp_path):
    chart = tmp_path / "forms.svg"
    asked = ("--hardware", "h200", "--tokens", "1,16384", "--mesh", "node=2,ep=4", "--mesh", "ep=3", "--chart", chart)
    found = run("sweep", net, *asked)
    assert found.exit_code == 0, found.stderr
    assert "T >= 3159: all_to_all" in found.stdout
    assert "no form is possible on this mesh" in found.stdout
    assert "all_to_all" in chart.read_text()
    assert len(json.loads(run("sweep", net, *asked[:-2], "--format", "json").stdout)) == 2


def test_a_model_explains_itself_on_a_mesh():
    import torch

    block = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
    found = moepass.explain(block, mesh="ep=4", hardware="H200")(torch.randn(8, 16))
    assert found.sites[0].ep.workload.mesh.P == 4
    with pytest.raises(errors.BadMesh):
        moepass.explain(block, mesh="ep")


def test_blocks_that_are_left_alone_stay_so(report):
    entry = report.sites[0].model_copy(
        update={"status": "skipped", "reason": "width_changes", "lowering": None, "ep": None}
    )
    alone = report.model_copy(update={"sites": (entry,)})
    assert over_ranks(alone, Spread("ep=2"), Hardware.preset("H200")).sites[0].ep is None


@pytest.mark.parametrize(
    ("value", "words"), [(0, "0 B"), (999, "999 B"), (999.9, "1 kB"), (1.5e9, "1.5 GB"), (2e15, "2000 TB")]
)
def test_sizes_have_three_digits(value, words):
    assert forms.size(value) == words


def test_old_reports_without_meshes_are_read(report):
    data = json.loads(report.to_json())
    del data["sites"][0]["ep"], data["sites"][0]["workload"]["mesh"]
    assert PlanReport.from_json(json.dumps(data)).sites[0].ep is None
    assert Workload(tokens=1, D=1, F=1, E=1, K=1, n=1).mesh is None
