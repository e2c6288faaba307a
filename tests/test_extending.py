"""The lowering of docs/extending.md, as it stands there, through every check of ``moepass verify`` and the planner."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest

from moepass.lowering.base import Lowering
from moepass.lowering.dense import DenseEinsum
from moepass.lowering.hardware import load_hardware
from moepass.lowering.plan import TokenRange, Workload
from moepass.lowering.planner import ranges
from moepass.verify import lowerings as checks

PAGE = Path(__file__).resolve().parents[1] / "docs" / "extending.md"


@pytest.fixture(scope="module")
def loop() -> Lowering:
    code = re.findall(r"```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)[0]
    module = types.ModuleType("docs_loop")
    sys.modules["docs_loop"] = module  # dataclasses look their module up
    exec(compile(code, str(PAGE), "exec"), vars(module))
    return module.Loop()


def test_it_is_about_fifty_lines():
    code = re.findall(r"```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)[0]
    assert code.count("\n") <= 60


def test_the_lowering_of_the_page_is_right_on_every_awkward_input(loop, monkeypatch):
    monkeypatch.setattr(checks, "lowerings", lambda: {"loop": loop})
    work = Workload(tokens=0, D=10, F=6, E=5, K=2, n=2, bias=True, train=True)
    found = list(checks.check_lowerings("page", work, "silu(g)*u"))
    assert [c for c in found if c.status != "ok"] == []
    assert any("poisoned rows" in c.name for c in found)


def test_the_planner_prices_it_beside_the_others(loop):
    work = Workload(tokens=64, D=64, F=64, E=8, K=2, n=2)
    pool = {"loop": loop, "dense": DenseEinsum()}
    (plan, *_) = ranges(work, load_hardware("H100"), TokenRange(low=1, high=4096), candidates=pool)
    assert {a.lowering for a in plan.alternatives} == set(pool)
    assert all(a.predicted is not None and a.predicted.total > 0 for a in plan.alternatives)
