"""Memory of a run; huge pages: asked for by command lines, never against a user's setting, and torch heeds them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moepass.upcycle.checkpoint.memory import use_huge_pages

_FAULTS = """
import resource
from moepass.upcycle.checkpoint.memory import use_huge_pages
use_huge_pages()
import torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.zeros(64 << 20, dtype=torch.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def test_a_setting_of_the_user_stays(monkeypatch):
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    use_huge_pages()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"


@pytest.mark.skipif(
    not _SETTING.exists() or "[never]" in _SETTING.read_text(), reason="this kernel gives no huge pages"
)
def test_torch_takes_them():
    env = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
    faults = {}
    for value in ("0", None):
        chosen = env if value is None else env | {"THP_MEM_ALLOC_ENABLE": value}
        done = subprocess.run([sys.executable, "-c", _FAULTS], env=chosen, capture_output=True, text=True, check=True)
        faults[value] = int(done.stdout)
    assert faults["0"] > 16_000  # 64 MB of pages of 4 KB
    assert faults[None] < faults["0"] / 2


def test_the_memory_of_a_run_does_not_grow_with_the_output(tmp_path):
    """128 MB copied; 32 MB and then 128 MB computed, from inputs of 2 MB."""
    part = {f"model.layers.{i}.up_proj.weight": torch.ones(1024, 1024).bfloat16() for i in range(4)}
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "config.json").write_text("{}")
    save_file(part, tmp_path / "src" / "model.safetensors")
    command = [sys.executable, "-P", "-c", MEMORY, str(tmp_path / "src"), str(tmp_path / "dst")]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    copied, computed, computed_more = json.loads(done.stdout)
    assert copied < 4 << 20, "a copy keeps no tensor in memory"
    assert computed < 48 << 20
    assert computed_more < 32 << 20


MEMORY = """
import json, sys
import torch
from moepass.upcycle.checkpoint.source import Source
from moepass.upcycle.checkpoint.tensors import Computed, OutTensor, Verbatim
from moepass.upcycle.checkpoint.writer import write

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

def run(recipe, name, layers):
    source = Source.open(sys.argv[1])
    some = list(source.headers.items())[:layers]
    out = [OutTensor(f"{n}.{e}", h.shape, h.dtype, recipe(n), n) for n, h in some for e in range(16)]
    before = peak()
    write(f"{sys.argv[2]}/{name}", out, source, {"config.json": b"{}"}, max_shard_size=8_000_000)
    return peak() - before

def doubled(n):
    return Computed((n,), lambda x: (x.float() * 2).bfloat16(), "")

doubled("").function(torch.ones(64, 64).bfloat16())  # what torch loads when it first computes
print(json.dumps([run(Verbatim, "a", 4), run(doubled, "b", 1), run(doubled, "c", 4)]))
"""
