"""``moepass explain --analyze``: which weights and inputs are used, and that the report says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

from moepass import cli
from moepass.explain import targets
from moepass.explain.report import PlanReport
from tests import moe_zoo

runner = CliRunner()


def analyzed(*args: object) -> PlanReport:
    torch._dynamo.reset()
    result: Result = runner.invoke(cli.app, ["explain", *(str(a) for a in args), "--analyze", "--format", "json"])
    assert result.exit_code == 0, result.stderr
    report = PlanReport.from_json(result.stdout)
    assert report.kind == "analyze"
    return report


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "user_nets.py"
    path.write_text(
        "import torch\nfrom torch import nn\n"
        "def bare():\n    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))\n"
        "def fed():\n    return bare(), torch.full((3, 16), 7.0)\n"
    )
    return path


def test_a_function_without_an_example_gets_drawn_inputs(script: Path):
    report = analyzed(f"{script}:bare", "--tokens", "2,8")
    assert [(s.tokens, sum(s.load)) for s in report.analysis.sites] == [(2, 4), (8, 16)]
    assert report.analysis.source == "its own weights; inputs drawn at random"
    assert [str(s.tokens) for s in report.sites] == ["T = 2", "T = 8"]


def test_an_example_is_run_as_it_is(script: Path):
    report = analyzed(f"{script}:fed")
    assert [s.tokens for s in report.analysis.sites] == [3]
    assert "its own example" in report.analysis.source


def test_other_token_counts_draw_their_values_from_the_example(script: Path):
    target = targets.load(f"{script}:fed", real=True)
    (x_TD,), _ = target.feed(5)
    assert x_TD.shape == (5, 16)
    assert set(x_TD.unique().tolist()) == {7.0}
    assert torch.equal(target.feed(5)[0][0], x_TD), "the same T gives the same values"


def test_an_exported_program_runs_with_its_weights(tmp_path: Path):
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)).eval()
    path = tmp_path / "net.pt2"
    torch.export.save(torch.export.export(model, (torch.randn(6, 16),)), path)
    report = analyzed(path)
    assert [(s.tokens, s.timed_as) for s in report.analysis.sites] == [(6, report.sites[0].id)]


def test_a_folder_with_weights_runs_on_random_token_ids(tmp_path: Path):
    model = moe_zoo.build("olmoe")
    model.save_pretrained(tmp_path)
    report = analyzed(tmp_path, "--tokens", "24")
    routed = [s for s in report.analysis.sites if s.id.endswith("experts")]
    assert [(s.tokens, sum(s.load)) for s in routed] == [(24, 24 * moe_zoo.K)] * moe_zoo.LAYERS
    assert len({s.load for s in routed}) > 1, "each layer's own router"
    assert f"token ids drawn at random below {moe_zoo.VOCAB}" in report.analysis.source


def test_a_folder_without_weights_runs_its_blocks_alone(tmp_path: Path):
    moe_zoo.build("olmoe").config.save_pretrained(tmp_path)
    report = analyzed(tmp_path, "--tokens", "24", "--routing", "skew=1.5")
    assert "drawn at random (skew=1.5 routing); no weights were read" in report.analysis.source
    assert len([s for s in report.analysis.sites if s.timings]) == 1, "layers of one kind share one run"
