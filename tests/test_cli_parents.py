"""``moepass upcycle --experts-from`` and ``--prompts``: output, refusals, and kill -9 with a resume."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dense_zoo import load, saved
from interrupted import interrupted
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from moepass import cli

runner = CliRunner()
SCRIPT = Path(__file__).with_name("kill_parents.py")


def run(*arguments):
    return runner.invoke(cli.app, [str(a) for a in arguments])


@pytest.fixture
def parents(tmp_path):
    """The base, and two fine-tunes of it."""
    folders = [saved("qwen3")]
    for k in (1, 2):
        folders.append(shutil.copytree(folders[0], tmp_path / f"tuned{k}"))
        tensors = load_file(folders[k] / "model.safetensors")
        draw = torch.Generator().manual_seed(k)
        made = {n: t + 0.1 * torch.randn(t.shape, generator=draw) for n, t in tensors.items()}
        save_file(made, folders[k] / "model.safetensors", metadata={"format": "pt"})
    return folders


@pytest.fixture
def options(parents, tmp_path):
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps([[[a, a + 1, a + 2]] for a in (5, 25, 45)]))
    given = [x for p in parents for x in ("--experts-from", str(p))]
    return [*given, "--router", "prompts", "--prompts", str(file)]


def test_parents_and_prompts_make_a_model_that_loads_and_is_called_approximate(parents, options, tmp_path):
    result = run("upcycle", parents[0], tmp_path / "dst", *options, "--verify")
    assert result.exit_code == 0, result.output
    assert "copy, 3 experts, top-2" in result.stdout
    assert "experts from src, tuned1, tuned2; other weights: their mean" in result.stdout
    assert "verdict: APPROX (the experts come from other models" in result.stdout
    assert "NOT the same function" in result.stdout, "the comparison informs only"
    assert load(tmp_path / "dst").config.num_experts == 3
    assert run("verify-checkpoint", parents[0], tmp_path / "dst").exit_code == 0


def test_a_dry_run_reports_the_parents_as_json(parents, options, tmp_path):
    command = ["upcycle", parents[0], tmp_path / "dst", *options, "--others", "base", "--experts", 6]
    result = run(*command, "--dry-run", "--format", "json")
    content = json.loads(result.stdout)
    assert content["parents"]["others"] == "base"
    assert content["parents"]["expert"] == [0, 0, 1, 1, 2, 2]
    assert [p["path"] for p in content["parents"]["of"]] == [str(p) for p in parents]
    assert content["prompts"]["prompts"] == [1, 1, 1]
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--experts", "4"], "experts=4 of the recipe is not divisible by the number of parents=3"),
        (["--others", "sum"], "choose one of average, base"),
        (["--experts-from", "missing"], "there is no such folder"),
        (["--router", "normal"], "go together"),
    ],
)
def test_a_refusal_is_one_line_and_exit_code_2(more, says, parents, options, tmp_path):
    result = run("upcycle", parents[0], tmp_path / "dst", *options, *more)
    assert result.exit_code == 2
    assert re.fullmatch(r"moepass: error: [^\n]+\n", result.stderr.lstrip("\n"))
    assert says in result.stderr
    assert not (tmp_path / "dst").exists()


def test_kills_and_resumes_give_identical_bytes(parents, options, tmp_path):
    """kill -9 at steps of the writer that are spread over the run."""
    command = [sys.executable, "-P", str(SCRIPT), str(parents[0]), str(tmp_path), *options, "--max-shard-size", "60KB"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["different"] == []
    assert result["kills"] == 6


@pytest.mark.parametrize("change", ["prompts", "order", "value", "others"])
def test_a_resume_with_other_inputs_is_refused(change, parents, options, tmp_path, monkeypatch):
    command = ["upcycle", parents[0], tmp_path / "dst", "--max-shard-size", "60KB"]
    with interrupted(monkeypatch):
        assert run(*command, *options).exit_code != 0
    if change == "prompts":
        Path(options[-1]).write_text(json.dumps([[[a, a + 1, a + 3]] for a in (5, 25, 45)]))
    elif change == "order":
        options[3], options[5] = options[5], options[3]
    elif change == "value":
        tensors = load_file(parents[2] / "model.safetensors")
        save_file({n: t + 1 for n, t in tensors.items()}, parents[2] / "model.safetensors", metadata={"format": "pt"})
    else:
        options += ["--others", "base"]
    result = run(*command, *options, "--resume")
    assert result.exit_code == 2
    assert "begun with another plan" in result.stderr
