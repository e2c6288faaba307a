"""``moepass emit`` and ``explain --kernels``: whole folders or nothing, safe names, refusals with a reason."""

from __future__ import annotations

import json
import runpy

import pytest
from typer.testing import CliRunner

from moepass import cli, errors
from moepass.explain import kernels
from moepass.explain.report import PlanReport, SitePlan
from moepass.kernels.aot import budgets, problems
from moepass.kernels.fused.problem import TARGETS
from moepass.lowering.plan import Alternative, Plan, TokenRange, Workload

runner = CliRunner()


def run(*args: object):
    return runner.invoke(cli.app, [str(a) for a in args])


def site(id="model.layers.0.mlp", lowering="fused", activation="silu(g)*u", low=0, **work) -> SitePlan:
    shape = {"tokens": 8, "D": 32, "F": 48, "E": 4, "K": 2, "n": 2, "dtype": "bfloat16", "device": "cuda"}
    plan = Plan(
        lowering=lowering,
        tokens=TokenRange(low=low, high=64),
        workload=Workload(**{**shape, **work}),
        alternatives=(Alternative(lowering=lowering, legal=True),),
        hardware="H200",
    )
    return SitePlan.from_plan(id, "moe", plan, activation=activation)


def report(*sites: SitePlan) -> PlanReport:
    return PlanReport(hardware="H200", device="cuda", sites=sites)


@pytest.fixture
def plan(tmp_path):
    def write(*sites: SitePlan):
        path = tmp_path / "saved.json"
        path.write_text(report(*sites).to_json())
        return path

    return write


def test_a_plan_becomes_a_folder_of_kernels(plan, tmp_path):
    done = run("emit", plan(site(train=True)), "-o", tmp_path / "out", "--target", "sm_90")
    assert done.exit_code == 0, done.output
    folder = tmp_path / "out" / "model.layers.0.mlp.T0-64"
    names = {path.name for path in folder.iterdir()}
    assert {"moe.py", "forward_up.py", "forward_routing.py", "backward_dw_in.py", "backward_combine_dx.py"} <= names
    assert str(folder) in done.stdout
    assert "H200" in (folder / "forward_up.py").read_text()
    assert PlanReport.from_json((tmp_path / "out" / "plan.json").read_text()).sites == (site(train=True),)


def test_only_fused_blocks_are_written_unless_asked(plan, tmp_path):
    path = plan(site(lowering="grouped"))
    refused = run("emit", path, "-o", tmp_path / "out", "--target", "H100")
    assert refused.exit_code == 2
    assert "--lowering fused" in refused.stderr
    assert not (tmp_path / "out").exists()
    done = run("emit", path, "-o", tmp_path / "out", "--target", "H100", "--lowering", "fused")
    assert done.exit_code == 0


def test_a_folder_that_is_there_is_left_alone(plan, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    refused = run("emit", plan(site()), "-o", tmp_path / "out", "--target", "gfx942")
    assert refused.exit_code == 2
    assert "not an empty folder" in refused.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    assert not list(tmp_path.glob(".out*"))


def test_an_empty_folder_is_filled(plan, tmp_path):
    (tmp_path / "out").mkdir()
    assert run("emit", plan(site()), "-o", tmp_path / "out", "--target", "sm_80").exit_code == 0
    assert (tmp_path / "out" / "plan.json").is_file()


@pytest.mark.parametrize("options", [["--target", "sm_75"], ["--target", "sm_90", "--lowering", "dense"]])
def test_what_cannot_be_written_is_refused_with_what_can(plan, tmp_path, options):
    done = run("emit", plan(site()), "-o", tmp_path / "out", *options)
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_hostile_site_names_stay_inside_the_folder(plan, tmp_path):
    names = ["../../etc/passwd", '"""; import os', "..", "a/b", "a b", "a_b"]
    done = run("emit", plan(*map(site, names)), "-o", tmp_path / "out", "--target", "sm_90")
    assert done.exit_code == 0, done.output
    folders = [path for path in (tmp_path / "out").iterdir() if path.is_dir()]
    assert len(folders) == len(names)
    assert all(set(f.name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-") for f in folders)
    for path in (tmp_path / "out").rglob("*.py"):
        compile(path.read_text(), str(path), "exec")
    assert {path.name for path in tmp_path.iterdir()} == {"saved.json", "out"}


def test_hostile_activations_of_a_plan_are_refused_and_nothing_is_written(plan, tmp_path):
    done = run("emit", plan(site(activation="__import__('os')")), "-o", tmp_path / "out", "--target", "sm_90")
    assert done.exit_code == 2
    assert "activation" in done.stderr
    assert not (tmp_path / "out").exists()


def test_emitted_launchers_refuse_weights_of_another_layout(plan, tmp_path):
    import torch

    run("emit", plan(site()), "-o", tmp_path / "out", "--target", "sm_90", "--transposed")
    moe = runpy.run_path(str(tmp_path / "out" / "model.layers.0.mlp.T0-64" / "moe.py"))["moe"]
    x, index, weight = torch.zeros(3, 32), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2)
    with pytest.raises(ValueError, match="strides"):
        moe(x, index, weight, torch.zeros(4, 96, 32), torch.zeros(4, 32, 48))
    with pytest.raises(ValueError, match="shapes"):
        moe(x, index, weight, torch.zeros(4, 96, 31), torch.zeros(4, 32, 48))


def test_a_report_carries_its_kernels_only_if_asked():
    plain = report(site(), site("other", lowering="grouped"))
    full = kernels.with_kernels(plain, "sm_90")
    assert plain.kernels == ()
    assert {k.site for k in full.kernels} == {"model.layers.0.mlp"}
    assert full.fingerprint == plain.fingerprint
    assert PlanReport.from_json(full.to_json()) == full
    up = next(k for k in full.kernels if k.name == "forward_up")
    assert "def up_projection" in up.source
    assert "M=16" in up.tile
    assert "forward_up (T in [0, 64], sm_90): M=16" in full.to_text()
    assert "def up_projection" in full.to_html()


@pytest.mark.parametrize("train", [False, True])
def test_kernels_of_a_budgeted_block_come_with_their_numbers(train):
    shape = problems.SHAPES["olmoe"]
    work = {"tokens": 64, "D": shape.D, "F": shape.F, "E": shape.E, "K": shape.K, "train": train}
    (block,) = kernels.blocks(report(site(**work)), "sm_90")
    up = next(k for k in kernels.sources(block) if k.name == "forward_up")
    launches = problems.launches(shape.problem(64, train=train), TARGETS["sm_90"], train=train)
    needed = budgets.find(next(x for x in launches if x.name == "up"), "sm_90")
    assert needed is not None
    assert (up.registers, up.spills, up.shared_bytes) == (needed.registers, 0, needed.shared)


@pytest.mark.parametrize("work", [{"dtype": "float64"}, {"capacity_factor": 1.0}, {"n": 1}, {"D": 0},
                                  {"dropout": True}, {"E": 513}])  # fmt: skip
def test_blocks_that_the_kernels_cannot_run_are_left_out(work):
    assert kernels.blocks(report(site(lowering="grouped", **work)), "sm_90", every=True) == ()


def test_explain_names_the_hardware_that_has_kernels(tmp_path):
    path = tmp_path / "net.py"
    path.write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))\n"
    )
    refused = run("explain", f"{path}:net", "--hardware", "cpu", "--kernels")
    assert refused.exit_code == 2
    assert "H200" in refused.stderr
    done = run("explain", f"{path}:net", "--hardware", "H200", "--tokens", "8", "--kernels", "--format", "json")
    assert done.exit_code == 0, done.output
    assert isinstance(json.loads(done.stdout)["kernels"], list)


def test_every_target_has_a_profile_and_every_profile_a_target():
    assert set(kernels.PROFILES) == set(TARGETS)
    assert set(kernels.ARCHITECTURES.values()) == set(TARGETS)
    with pytest.raises(errors.BadOption, match="sm_90"):
        kernels.profile_of("TPU")
