"""A warm second process: Inductor's and AOTAutograd's caches are hit, the plan is reported all the same, a changed plan
misses.  Each run is a process of its own; runs of one test share a cache folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys
import torch, torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
import moepass

class FFN(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(x)))

def step(experts, converted, train, dynamic, plan=None):
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model, x = FFN(), torch.randn(16, 32)
    expected = model(x).detach()
    spec = moepass.MoESpec(experts=moepass.ExpertSpec(num_experts=experts))
    if converted:
        moepass.convert(model, spec)
    options = {"spec": spec, "strict": True, "plan": plan}
    fast = torch.compile(model, backend="moepass", options=options, dynamic=dynamic)
    with torch.set_grad_enabled(train):
        y = fast(x)
    if train:
        y.sum().backward()
        owned = model.parameters() if converted else moepass.moe_parameters(model)
        assert all(p.grad is not None for p in owned)
    assert torch.allclose(y, expected, atol=1e-5)
    report = moepass.last_plan()
    return {
        "fx": {k: v for k, v in counters["inductor"].items() if k.startswith("fxgraph_cache")},
        "aot": dict(counters["aot_autograd"]),
        "sites": [[s.id, s.kind, s.status, s.lowering] for s in report.sites],
        "fingerprint": report.fingerprint,
        "plan": report.to_json(),
    }

print(json.dumps([step(**arguments) for arguments in json.loads(sys.argv[1])]))
"""


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    """``process(*steps)`` runs the steps in a new process; all processes of this file share the compile caches."""
    folder = tmp_path_factory.mktemp("caches")
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}

    def run(*steps):
        command = [sys.executable, "-c", SCRIPT, json.dumps(steps)]
        done = subprocess.run(
            command, env=environment, cwd=folder, capture_output=True, text=True, timeout=500, check=False
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


def step(experts=8, *, converted=False, train=False, dynamic=None, plan=None):
    return {"experts": experts, "converted": converted, "train": train, "dynamic": dynamic, "plan": plan}


def assert_miss(result):
    assert result["aot"]["autograd_cache_miss"] >= 1  # a symbolic float makes Dynamo trace again under dynamic=True
    assert result["fx"]["fxgraph_cache_miss"] >= 1
    assert "autograd_cache_hit" not in result["aot"]
    assert "fxgraph_cache_hit" not in result["fx"]
    assert_no_bypass(result)


def assert_hit(result):
    """An AOTAutograd hit loads Inductor's artifacts through FxGraphCache, which counts them."""
    assert result["aot"]["autograd_cache_hit"] == 1
    assert result["fx"]["fxgraph_cache_hit"] >= 1
    assert "autograd_cache_miss" not in result["aot"]
    assert "fxgraph_cache_miss" not in result["fx"]
    assert_no_bypass(result)


def assert_no_bypass(result):
    assert not result["aot"].get("autograd_cache_bypass")
    assert not result["fx"].get("fxgraph_cache_bypass")


#: The one-line form with gradients, the converted form with symbolic sizes, and the one-line form without gradients.
STEPS = [step(train=True), step(converted=True, dynamic=True), step(experts=2)]


@pytest.mark.slow
def test_a_warm_second_process_hits_both_caches_reports_the_plan_and_misses_with_another_lowering(process, tmp_path):
    cold = process(*STEPS)
    plan = tmp_path / "plan.json"
    report = json.loads(cold[-1]["plan"])
    other = "grouped" if cold[-1]["sites"][0][3] != "grouped" else "dense"
    report["sites"][0]["lowering"] = other
    plan.write_text(json.dumps(report))
    *warm, pinned = process(*STEPS, step(experts=2, plan=str(plan)))

    for first, second in zip(cold, warm, strict=True):
        assert_miss(first)
        assert_hit(second)
        assert second["sites"] == first["sites"]
        assert second["sites"][0][2] == "lowered"
        assert second["fingerprint"] == first["fingerprint"]
    assert_miss(pinned)
    assert pinned["sites"][0][3] == other
