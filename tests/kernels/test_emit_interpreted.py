"""Emitted files in Triton's interpreter: they agree with plain PyTorch, and with the library bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moepass.kernels.emit.block import emit_block
from moepass.kernels.fused.problem import TARGETS, Problem


def run(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-W", "ignore", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, timeout=400)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{(case, what): passed}"""
    folder = tmp_path_factory.mktemp("emitted")
    done = run(Path(__file__).with_name("emitted_child.py"), folder, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    return {(case, what): passed for case, what, passed in json.loads(done.stderr.splitlines()[-1])}


@pytest.mark.parametrize(
    ("case", "least"),
    [("gated", 13), ("ungated", 13), ("gpt_oss", 13), ("forms", 13), ("decoding", 6), ("decoding_gpt_oss", 6)],
)
def test_every_file_agrees_with_plain_pytorch(results, case, least):
    steps = {what: passed for (name, what), passed in results.items() if name == case}
    assert len(steps) >= least
    assert all(steps.values()), steps


@pytest.mark.parametrize("case", ["gated", "ungated", "gpt_oss", "forms", "decoding", "decoding_gpt_oss"])
def test_the_emitted_kernels_are_the_librarys_bit_for_bit(results, case):
    assert results[case, "bit-equal with the library"]


def test_a_wrong_kernel_is_noticed(results):
    assert results["gated", "exit code 0"]
    assert results["gated", "exit code 1 where it differs"]


def test_a_file_runs_by_itself_and_needs_no_moepass(tmp_path):
    p = Problem(
        tokens=8, D=16, F=16, E=2, K=1, n=1, dtype="bfloat16", activation="gelu", w_in=(256, 16, 1), w_out=(256, 16, 1)
    )
    path = tmp_path / "forward_up.py"
    path.write_text(emit_block(p, TARGETS["sm_90"], train=False).files["forward_up.py"])
    assert "import moepass" not in path.read_text()
    assert "from moepass" not in path.read_text()
    done = run(path, TRITON_INTERPRET="")  # without a GPU it turns the interpreter on itself
    assert done.returncode == 0, done.stderr
    assert "agrees with plain PyTorch" in done.stdout
