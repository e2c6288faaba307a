"""The quality experiment, in miniature: every arm trains, exact arms start at the dense loss, others do not.

Where arms end after a few steps is noise; nothing is asserted about it.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ARMS = "main,router_warm,router_frozen,std_3,shuffled,redrawn_05,softmax_first,two_blocks"
SIZES = ["--pretrain", "40", "--steps", "4", "--width", "32", "--batch", "8", "--windows", "32", "--seeds", "1"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The recipes and a candidate for each lever, as a user would start them: runs by the arm's name, and the files."""
    out = tmp_path_factory.mktemp("quality")
    command = [sys.executable, "-m", "benchmarks.upcycle_quality", "--arms", ARMS, *SIZES]
    command += ["--work", str(out / "work"), "--out", str(out)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    content = json.loads((out / "upcycle_quality.json").read_text())
    return {run["arm"]: run for run in content["runs"]}, out


#: Arms that do not start as the dense function.
APPROXIMATE = {"drop", "scratch", "redrawn_05", "softmax_first"}


def test_every_arm_trains_and_is_reported(results):
    runs, out = results
    assert {*ARMS.split(",")[1:], "dense", "dense_flops", "groups", "copy", "drop", "scratch"} == set(runs)
    for run in runs.values():
        assert {int(step) for step in run["held_out"]} >= {0, 2, 4}
        assert all(math.isfinite(loss) for loss in (run["final"], *run["held_out"].values()))
        assert run["final"] != run["held_out"]["0"], "nothing was trained"
    table = (out / "upcycle_quality.md").read_text()
    assert table.count("\n| ") == len(runs) + 2


def test_exact_arms_start_at_the_dense_loss_and_the_others_do_not(results):
    runs, _ = results
    dense = runs["dense"]["held_out"]["0"]
    apart = {name: abs(run["held_out"]["0"] - dense) for name, run in runs.items()}
    assert {name for name, difference in apart.items() if difference > 1e-4} == APPROXIMATE


def test_virtual_groups_cost_what_dense_costs_and_top_2_of_full_width_twice_that(results):
    runs, _ = results
    cost = {name: run["ffn_flops"] / runs["dense"]["ffn_flops"] for name, run in runs.items()}
    assert cost["groups"] == pytest.approx(1.0, abs=0.03)
    assert cost["copy"] == cost["drop"] == cost["scratch"] == pytest.approx(2.0, abs=0.03)
    spent = {name: run["steps"] * run["flops"] for name, run in runs.items()}
    assert spent["dense_flops"] == pytest.approx(spent["copy"], rel=0.15)  # whole steps


def test_a_second_run_finds_what_the_first_has_done(results):
    runs, out = results
    saved = {path.name.split("-")[0] for path in (out / "work").glob("*.json")}
    assert saved == set(runs)
