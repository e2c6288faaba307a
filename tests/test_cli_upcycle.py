"""``moepass upcycle`` and ``moepass verify-checkpoint``: exit codes, what reaches stdout, and how errors look."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from dense_zoo import error, save, saved
from interrupted import interrupted
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from moepass import cli

runner = CliRunner()


def run(*arguments):
    return runner.invoke(cli.app, [str(a) for a in arguments])


def spoil(folder):
    """One weight off: what a wrong conversion would look like."""
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith("experts.0.down_proj.weight"))
    tensors[name] = tensors[name] + torch.randn_like(tensors[name]) * 0.01
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_the_default_upcycles_exactly_and_says_so(tmp_path):
    result = run("upcycle", saved("qwen3"), tmp_path / "dst", "--verify")
    assert result.exit_code == 0, result.output
    assert "qwen3 -> qwen3_moe: copy, 8 experts, top-2, 2 of 2 layers" in result.stdout
    assert "verdict: EXACT" in result.stdout
    assert "is the same function as" in result.stdout
    assert "wrote" in result.stderr
    assert error(saved("qwen3"), tmp_path / "dst") <= 5e-6


def test_a_dry_run_prints_the_plan_as_json_and_writes_nothing(tmp_path):
    options = ["--init", "virtual-groups", "--to", "glm4_moe", "--dry-run", "--format", "json", "--seed", "3"]
    result = run("upcycle", saved("llama"), tmp_path / "dst", *options)
    assert result.exit_code == 0
    content = json.loads(result.stdout)
    assert (content["from"], content["to"], content["recipe"]["seed"]) == ("llama", "glm4_moe", 3)
    assert content["sizes"]["shards"][0][0] == "model.safetensors"
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    ("family", "options", "says"),
    [
        ("llama", ["--top-k", "1"], "could never learn"),
        ("llama", ["--to", "qwen3_moe"], "llama can become mixtral"),
        ("llama", ["--init", "clone"], "choose one of copy"),
        ("mistral", ["--to", "granitemoe"], "use --to mixtral"),
    ],
)
def test_a_refusal_is_one_line_and_exit_code_2(family, options, says, tmp_path):
    result = run("upcycle", saved(family), tmp_path / "dst", *options)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert re.fullmatch(r"moepass: error: [^\n]+\n", result.stderr.lstrip("\n"))
    assert says in result.stderr
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("where", ["missing", "pickled", "not empty", "inside"])
def test_folders_that_cannot_be_used_are_refused(where, tmp_path):
    src, dst = tmp_path / "src", tmp_path / "dst"
    if where == "pickled":
        src.mkdir()
        (src / "config.json").write_text('{"model_type": "llama"}')
        (src / "pytorch_model.bin").write_bytes(b"x")
    elif where != "missing":
        save(src, "llama")
    if where == "not empty":
        dst.mkdir()
        (dst / "mine").write_text("keep")
    if where == "inside":
        dst = src / "dst"
    before = sorted(p.name for p in tmp_path.rglob("*"))
    result = run("upcycle", src, dst)
    assert result.exit_code == 2
    assert "moepass: error: " in result.stderr
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_verify_checkpoint_fails_where_an_exact_method_is_not_exact(tmp_path):
    src = saved("qwen3")
    assert run("upcycle", src, tmp_path / "dst", "--experts", 4).exit_code == 0
    good = run("verify-checkpoint", src, tmp_path / "dst", "--format", "json", "--tokens", "1,2,3")
    assert good.exit_code == 0
    assert [c["tokens"] for c in json.loads(good.stdout)["comparisons"]] == ["random", "given"]
    spoil(tmp_path / "dst")
    bad = run("verify-checkpoint", src, tmp_path / "dst")
    assert bad.exit_code == 1
    assert "NOT the same function" in bad.stdout


def test_verify_checkpoint_only_reports_where_the_method_is_approximate(tmp_path):
    src = saved("qwen3")
    assert run("upcycle", src, tmp_path / "dst", "--experts", 4, "--init", "drop", "--verify").exit_code == 0
    result = run("verify-checkpoint", src, tmp_path / "dst")
    assert result.exit_code == 0
    assert "NOT the same function" in result.stdout


def test_token_ids_that_are_no_ids_are_refused(tmp_path):
    src = saved("qwen3")
    assert run("upcycle", src, tmp_path / "dst", "--experts", 4).exit_code == 0
    assert run("verify-checkpoint", src, tmp_path / "dst", "--tokens", "one").exit_code == 2
    assert run("verify-checkpoint", src, tmp_path / "dst", "--tokens", "1,99999").exit_code == 2


def assert_same_files(whole, dst):
    for path in whole.iterdir():
        assert (dst / path.name).read_bytes() == path.read_bytes(), path.name


def test_an_interrupted_run_is_continued_and_gives_the_same_bytes(tmp_path, monkeypatch):
    src, options = saved("qwen3"), ["--init", "noise", "--experts", 4, "--max-shard-size", "60KB"]
    assert run("upcycle", src, tmp_path / "whole", *options).exit_code == 0
    with interrupted(monkeypatch):
        assert run("upcycle", src, tmp_path / "dst", *options).exit_code != 0
    assert not (tmp_path / "dst" / "config.json").exists(), "an unfinished folder does not look complete"
    assert run("upcycle", src, tmp_path / "dst", *options).exit_code == 2, "it must be said that it is continued"
    assert run("upcycle", src, tmp_path / "dst", *options, "--resume").exit_code == 0
    assert_same_files(tmp_path / "whole", tmp_path / "dst")


@pytest.mark.parametrize("on", ["weights", "activations"])
def test_an_interrupted_cluster_is_continued_with_the_same_order_only(on, tmp_path, monkeypatch):
    src, options = saved("qwen2"), ["--init", "cluster", "--cluster-on", on, "--experts", 4, "--max-shard-size", "20KB"]
    if on == "activations":
        (tmp_path / "ids.json").write_text(json.dumps([[5, 9, 33, 2, 7] * 8, [1, 2, 3]]))
        options += ["--shared", 16, "--router", "centroids", "--calibration-tokens", tmp_path / "ids.json"]
    assert run("upcycle", src, tmp_path / "whole", *options).exit_code == 0
    with interrupted(monkeypatch):
        assert run("upcycle", src, tmp_path / "dst", *options).exit_code != 0
    other = [*options, "--seed", 1] if on == "weights" else [*options[:-1], "1,2,3,4,5,6,7,8"]
    assert run("upcycle", src, tmp_path / "dst", *other, "--resume").exit_code == 2
    done = run("upcycle", src, tmp_path / "dst", *options, "--resume")
    assert done.exit_code == 0, done.output
    assert_same_files(tmp_path / "whole", tmp_path / "dst")


def test_an_approximate_plan_prints_its_verdict_and_its_error(tmp_path):
    options = ["--init", "drop", "--drop-indices", "independent", "--dry-run"]
    result = run("upcycle", saved("qwen3"), tmp_path / "dst", *options)
    assert result.exit_code == 0, result.output
    assert "verdict: APPROX (50% of the channels are re-initialised, drawn for each matrix on its own)" in result.stdout
    assert re.search(r"measured: relative error \d\.\d+ of the feed-forward block of layer 0 on 256 G", result.stdout)
    assert not (tmp_path / "dst").exists()


def test_help_is_quick_and_loads_no_torch():
    code = "import sys; from moepass import cli; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
