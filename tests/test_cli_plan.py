"""``moepass diff`` and ``moepass sweep``, ``--require`` and ``--routing``: results, exit codes, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from moepass import cli
from moepass.explain import targets
from moepass.explain.report import PlanReport

runner = CliRunner()


def run(*args: object) -> Result:
    return runner.invoke(cli.app, [str(a) for a in args])


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models") / "user_net.py"
    path.write_text(
        "from torch import nn\n"
        "def net():\n    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))\n"
    )
    return f"{path}:net"


def plan(net: str, folder: Path, name: str, *options: str) -> Path:
    path = folder / name
    assert run("explain", net, "--tokens", "1,4096", "--format", "json", "-o", path, *options).exit_code == 0
    return path


def test_diff_says_what_changed_and_exits_with_1(net, tmp_path):
    a = plan(net, tmp_path, "a.json", "--hardware", "H100")
    b = plan(net, tmp_path, "b.json", "--hardware", "cpu")

    same = run("diff", a, a)
    assert (same.exit_code, same.stdout.splitlines()[-1]) == (0, "same decisions at all 1 sites")

    other = run("diff", a, b)
    assert other.exit_code == 1
    assert "hardware: H100 -> cpu" in other.stdout
    parsed = json.loads(run("diff", a, b, "--format", "json").stdout)
    assert parsed["same"] is False


@pytest.mark.parametrize("content", [None, "not json", "{}"])
def test_diff_of_what_is_no_plan_is_one_line_with_the_file_in_it(net, tmp_path, content):
    good, bad = plan(net, tmp_path, "a.json"), tmp_path / "bad.json"
    if content is not None:
        bad.write_text(content)

    result = run("diff", good, bad)

    assert (result.exit_code, result.stdout) == (2, "")
    assert "bad.json" in result.stderr
    assert "Traceback" not in result.stderr


def test_require_prints_the_plan_and_exits_with_1_where_it_is_not_met(net):
    met = run("explain", net, "--tokens", "4096", "--require", "*=lowered")
    assert met.exit_code == 0

    unmet = run("explain", net, "--tokens", "4096", "--format", "json", "--require", "*=capacity")
    assert unmet.exit_code == 1
    assert PlanReport.from_json(unmet.stdout).summary["lowered"] == 1
    assert "not met: *=capacity" in unmet.stderr

    wrong = run("explain", net, "--require", "*=fastest")
    assert (wrong.exit_code, wrong.stdout) == (2, "")


def test_routing_changes_prices_and_is_named(net):
    texts = [run("explain", net, "--tokens", "64", "--routing", name).stdout for name in ("balanced", "skew=2")]
    assert "balanced routing" in texts[0]
    assert "skew=2 routing" in texts[1]
    refused = run("explain", net, "--routing", "zipf")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "random, balanced, skew=NUMBER" in refused.stderr


def test_sweep_prints_a_table_for_every_machine_and_draws_the_first(net, tmp_path):
    chart = tmp_path / "chart.svg"
    result = run("sweep", net, "--hardware", "H100,cpu", "--tokens", "1,512", "--chart", chart)

    assert result.exit_code == 0, result.stderr
    assert "on H100" in result.stdout
    assert "on cpu" in result.stdout
    assert chart.read_text().startswith("<svg")
    assert len(json.loads(run("sweep", net, "--format", "json").stdout)) == 1


def test_published_models_have_the_published_sizes():
    """Parameters of the models that the configs stand for, from their model cards."""
    billions = {
        "olmoe-1b-7b": 6.92, "mixtral-8x7b": 46.7, "mixtral-8x22b": 140.6, "qwen3-30b-a3b": 30.5,
        "qwen3-235b-a22b": 235.1, "deepseek-v3": 671.0, "gpt-oss-20b": 20.9, "gpt-oss-120b": 116.8,
    }  # fmt: skip
    assert set(targets.PUBLISHED) == set(billions)
    for name, size in billions.items():
        model = targets.load(name).model
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(size, rel=2e-3)


def test_a_published_model_explains_by_its_name():
    result = run("explain", "olmoe-1b-7b", "--hardware", "H100", "--tokens", "4096", "--require", "*.experts=grouped")
    assert result.exit_code == 0, result.stderr
    assert "model.layers.*.mlp.experts  (x16)" in result.stdout
