"""Huge pages: asked for by command lines, never against the user's own setting, and torch heeds them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
