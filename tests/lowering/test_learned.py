"""The file of facts: bounded, shared between processes, rebuilt when damaged, off where ranks must agree."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import moepass
from moepass import cli
from moepass.lowering import cache, hardware, learned, machine
from moepass.lowering.facts import Fact
from moepass.lowering.hardware import Hardware, load_hardware, remember
from moepass.lowering.plan import Workload

WORK = Workload(tokens=64, D=256, F=128, E=16, K=2, n=2)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEPASS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("MOEPASS_LEARN", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    hardware.forget_default()
    yield
    hardware.forget_default()


def fact(T: int, seconds: float = 1.0, source: str = "measure") -> Fact:
    work = WORK.model_copy(update={"tokens": T})
    return Fact(work=work, seconds=(("dense", seconds),), source=source, runs=3)


def test_facts_come_back_and_reach_the_default_profile():
    assert load_hardware(None, "cpu") == Hardware.preset("cpu"), "a cold start plans with the preset"
    remember("cpu", [fact(64)])
    profile = load_hardware(None, "cpu")
    assert profile.facts == (fact(64),)
    assert profile.fingerprint != Hardware.preset("cpu").fingerprint
    assert load_hardware("cpu").facts == (), "a profile asked for by name is what it says"


def test_a_newer_fact_replaces_the_older_one_and_the_same_one_writes_nothing():
    assert learned.record("cpu", [fact(64), fact(65)])
    assert learned.record("cpu", [fact(64, 2.0)])
    assert learned.load("cpu") == (fact(65), fact(64, 2.0))
    path = cache.directory() / learned.file("cpu")
    before = path.stat().st_mtime_ns, path.stat().st_ino
    assert not learned.record("cpu", [fact(64, 2.0)])
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before


def test_the_oldest_are_forgotten_first(monkeypatch):
    monkeypatch.setattr(learned, "LIMIT", 3)
    for T in range(1, 6):
        learned.record("cpu", [fact(T)])
    assert [f.work.tokens for f in learned.load("cpu")] == [3, 4, 5]


@pytest.mark.parametrize(
    "damage", ["{", "[]", '{"version": 99}', "version", "machine", "facts", "seconds"], ids=lambda d: str(d)[:10]
)
def test_a_damaged_or_foreign_file_is_said_so_and_made_anew(caplog, damage):
    learned.record("cpu", [fact(64)])
    path = cache.directory() / learned.file("cpu")
    content = json.loads(path.read_text())
    broken = {"version": 0, "machine": {"device": "abacus"}, "facts": "none"}
    if damage in broken:
        path.write_text(json.dumps(content | {damage: broken[damage]}))
    elif damage == "seconds":
        content["facts"][0]["seconds"] = [["dense", -1]]
        path.write_text(json.dumps(content))
    else:
        path.write_text(damage)
    assert learned.load("cpu") == ()
    assert "ignoring" in caplog.text
    assert learned.record("cpu", [fact(65)])
    assert learned.load("cpu") == (fact(65),)


def test_writers_in_several_processes_lose_nothing(tmp_path):
    code = (
        "import sys; from moepass.lowering import learned; from moepass.lowering.facts import Fact;"
        "from moepass.lowering.plan import Workload;"
        "first = int(sys.argv[1]);"
        "[learned.record('cpu', [Fact(work=Workload(tokens=T, D=1, F=1, E=2, K=1, n=1), seconds=(('dense', 1.0),),"
        " source='measure', runs=1)]) for T in range(first, first + 20)]"
    )
    writers = [
        subprocess.Popen([sys.executable, "-P", "-c", code, str(first)], cwd=tmp_path, env=dict(os.environ))
        for first in (1, 101)
    ]
    assert [w.wait(120) for w in writers] == [0, 0]
    # A child may count threads otherwise than pytest does: read what the children wrote.
    (path,) = cache.directory().glob("learned-*.json")
    found = json.loads(path.read_text())["facts"]
    assert sorted(f["work"]["tokens"] for f in found) == [*range(1, 21), *range(101, 121)]


@pytest.mark.parametrize(("name", "value"), [("MOEPASS_LEARN", "0"), ("WORLD_SIZE", "2")])
def test_nothing_is_learned_where_it_is_off_or_ranks_must_agree(monkeypatch, name, value):
    learned.record("cpu", [fact(64)])
    monkeypatch.setenv(name, value)
    assert not learned.enabled()
    assert learned.load("cpu") == ()
    assert not learned.record("cpu", [fact(65)])
    monkeypatch.undo()


def test_an_unwritable_cache_only_costs_a_warning(tmp_path, monkeypatch, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("MOEPASS_CACHE_DIR", str(blocked / "below"))
    assert not learned.record("cpu", [fact(64)])
    assert "could not write" in caplog.text


def dense() -> nn.Module:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))


def test_an_analysis_teaches_the_next_plan_which_says_so():
    model, x_TD = dense(), torch.randn(12, 16)
    with torch.no_grad():
        first = moepass.explain(model, analyze=True)(x_TD)
        second = moepass.explain(model)(x_TD)
    assert {s.decided_by for s in first.sites} == {"estimate"}
    (entry,), (seen,) = second.sites, first.analysis.sites
    assert entry.decided_by == "measurement"
    assert entry.lowering == seen.timings[0].lowering, "the fastest that was measured"
    assert entry.measured == seen.timings[0].seconds
    assert "measured on this machine before, by --analyze" in entry.evidence
    assert "evidence: measured on this machine before" in second.to_text()
    assert "Evidence: measured on this machine before" in second.to_html()
    with torch.no_grad():
        elsewhere = moepass.explain(model, hardware="H100")(x_TD)
    assert {s.decided_by for s in elsewhere.sites} == {"estimate"}


def test_measured_compiles_teach_too():
    model, x_TD = dense(), torch.randn(12, 16)
    with torch.no_grad():
        torch.compile(model, backend="moepass", options={"inner": "eager", "measure": True})(x_TD)
    (known,) = learned.load("cpu")
    assert (known.source, known.work.tokens) == ("measure", 12)
    (site,) = moepass.last_plan().sites
    assert (site.decided_by, site.evidence) == ("measurement", None), "measured now, not before"


def test_the_command_shows_and_forgets(monkeypatch):
    learned.record("cpu", [fact(64), fact(65)])
    state = json.loads(CliRunner().invoke(cli.app, ["calibrate", "--show"]).stdout)
    assert (state["source"], state["learned_workloads"], state["outdated"]) == ("preset", 2, None)
    assert "2 workloads" in CliRunner().invoke(cli.app, ["calibrate", "--forget"]).stdout
    assert learned.load("cpu") == ()
    both = CliRunner().invoke(cli.app, ["calibrate", "--show", "--forget"])
    assert (both.exit_code, both.stdout) == (2, "")


def test_an_outdated_profile_is_said_so(caplog):
    then = machine.describe("cpu") | {"torch": "1.0", "threads": "99"}
    profile = Hardware.preset("cpu").model_copy(update={"source": "calibrated"})
    cache.write("hardware-cpu-0123.json", {"machine": then, "profile": profile.model_dump(mode="json")})
    assert load_hardware(None, "cpu").source == "preset"
    assert "hardware-cpu-0123.json was calibrated on something else (torch 1.0 then" in caplog.text
    assert "threads 99 then" in caplog.text
    assert "run `moepass calibrate`" in caplog.text
    assert caplog.text.count("calibrated on something else") == 1
    load_hardware(None, "cpu")
    assert caplog.text.count("calibrated on something else") == 1, "once"


def test_a_calibrated_profile_of_another_machine_given_as_a_file_is_said_so(tmp_path, caplog):
    for versions, warned in ((machine.describe("cpu"), False), ({"torch": "1.0"}, True)):
        fields = dict(Hardware.preset("cpu")) | {"source": "calibrated", "versions": tuple(versions.items())}
        path = tmp_path / "mine.json"
        path.write_text(Hardware.model_validate(fields).model_dump_json())
        load_hardware(path)
        assert ("was calibrated on another machine" in caplog.text) == warned
