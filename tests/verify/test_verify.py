"""``moepass.verify`` on sound models: it passes, changes nothing, and says what it checked and what it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import moe_zoo
import pytest
import torch
import zoo
from tiny import D, Net, fresh  # noqa: F401 -- fresh is a fixture
from torch import nn
from typer.testing import CliRunner

import moepass
from moepass import errors
from moepass.attach import attached_states
from moepass.cli import app
from moepass.explain import targets
from moepass.spec import DispatchSpec, ExpertSpec, LossSpec, MoESpec, RouterSpec
from moepass.verify.compare import equal_bits, mismatch, poisoned_memory, worst_gradient
from moepass.verify.report import Check, VerifyReport

NET = """
import torch, tiny

def make():
    torch.manual_seed(0)
    return tiny.Net(1), (torch.randn(8, tiny.D),)
"""


def subjects(report: VerifyReport) -> set[str]:
    return {c.subject for c in report.checks if c.status == "ok"}


def test_a_dense_model_is_verified_under_every_lowering_and_left_as_it_was():
    model, x = Net(1), torch.randn(40, D)
    before = {n: p.clone() for n, p in model.named_parameters()}
    report = moepass.verify(model, x)
    assert report.ok, report.to_text()
    expected = {"stable sorts", "layers.0", "compiled", "compiled: dense function", "recompute", "in-place update"}
    lowerings = {f"{name} in layers.0" for name in ("dense", "gathered", "grouped")}
    others = {"compiled with grouped", "compiled with gathered", "second step"}
    assert subjects(report) >= expected | lowerings | others
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not list(attached_states(model))
    assert model.training


def test_a_model_with_our_blocks_is_verified_with_losses_capacity_and_shared_experts():
    spec = MoESpec(
        router=RouterSpec(score="sigmoid", bias=True, scale=1.5),
        experts=ExpertSpec(
            num_experts=4, intermediate_size=12, activation="swiglu", bias_in=True, bias_out=True,
            shared_intermediate_size=8,
        ),
        dispatch=DispatchSpec(capacity_factor=1.0, drop_policy="probability"),
        losses=LossSpec(load_balance="megatron", z_weight=0.01),
    )  # fmt: skip
    torch.manual_seed(0)
    report = moepass.verify(nn.Sequential(nn.Linear(16, 16), spec.build(16)), torch.randn(2, 12, 16))
    assert report.ok, report.to_text()
    names = {(c.subject, c.name) for c in report.checks if c.status == "ok"}
    assert ("1", "attached losses") in names
    assert ("capacity in 1, probability", "over capacity: gradients") in names


def test_a_transformers_moe_is_compared_with_its_own_eager_loop():
    model = moe_zoo.build("olmoe", num_hidden_layers=1)
    report = moepass.verify(model, against="float64", train=False, **moe_zoo.inputs("olmoe", 12))
    assert report.ok, report.to_text()
    assert {c.name for c in report.checks if c.subject == "compiled"} == {"outputs", "gradients", "two runs"}


def test_the_command_prints_json_and_exits_with_0(tmp_path):
    script = tmp_path / "net.py"
    script.write_text(f"import sys; sys.path.append({str(Path(__file__).parents[1])!r})\n" + NET)
    done = CliRunner().invoke(app, ["verify", f"{script}:make", "--format", "json", "--tokens", "12"])
    assert done.exit_code == 0, done.output
    report = VerifyReport.model_validate(json.loads(done.stdout))
    assert report.ok
    assert report.against == "float64"
    assert "second step" not in subjects(report), "--train was not asked for"


def test_the_command_exits_with_1_where_a_check_fails(tmp_path):
    script = tmp_path / "linear.py"
    script.write_text("import torch\ndef make():\n    return torch.nn.Linear(4, 4), (torch.randn(3, 4),)\n")
    done = CliRunner().invoke(app, ["verify", f"{script}:make"])
    assert done.exit_code == 1
    assert "nothing to verify" in done.stdout


def test_a_folder_is_loaded_with_its_weights_or_with_random_ones(tmp_path):
    model = zoo.build("qwen3").model
    model.config.save_pretrained(tmp_path)
    drawn = targets.load(str(tmp_path), real=True, drawn_weights=True)
    assert not any(p.is_meta for p in drawn.model.parameters())
    (_, given), meta = drawn.feed(12), targets.load(str(tmp_path)).feed(12)[1]
    assert given["input_ids"].shape == meta["input_ids"].shape
    assert given["input_ids"].unique().numel() > 1
    model.save_pretrained(tmp_path)
    read = targets.load(str(tmp_path), real=True).model
    assert all(torch.equal(p, read.get_parameter(n)) for n, p in model.named_parameters())
    with pytest.raises(errors.BadTarget, match=r"its \d+.* G parameters"):
        targets.load("mixtral-8x7b", real=True, drawn_weights=True)


def test_a_model_without_a_block_is_not_verified():
    report = moepass.verify(nn.Linear(4, 4), torch.randn(3, 4), train=False)
    assert not report.ok
    assert "nothing to verify" in report.failures[0].detail


def test_narrow_models_are_verified_as_float32_copies_and_say_so():
    torch.manual_seed(0)
    report = moepass.verify(Net(1).bfloat16(), torch.randn(24, D).bfloat16(), train=False, against="eager")
    assert report.ok, report.to_text()
    assert "float32 copy" in report.notes[0]
    lowering = next(c for c in report.checks if c.subject == "grouped in layers.0")
    assert lowering.tolerance == pytest.approx(4e-2), "the lowerings run in the model's own dtype"


def test_a_router_that_draws_its_experts_is_not_compared():
    spec = MoESpec(router=RouterSpec(assignment="random"), experts=ExpertSpec(intermediate_size=8, activation="gelu"))
    report = moepass.verify(nn.Sequential(spec.build(8)), torch.randn(9, 8))
    assert [c.detail for c in report.checks if c.subject == "model"] == [
        "a router draws its experts at random: two runs differ by design"
    ]


@pytest.mark.parametrize(("field", "value"), [("against", "float16"), ("options", {"iner": "eager"})])
def test_a_bad_option_is_refused(field, value):
    with pytest.raises(ValueError, match=r"float16|iner"):
        moepass.verify(Net(1), torch.randn(4, D), **{field: value})


def test_a_check_that_raises_is_a_failed_check():
    class Broken(Net):
        def forward(self, x):
            if torch.compiler.is_compiling():
                raise errors.BadOption(name="x", value=1, detail="only when compiled")
            return super().forward(x)

    report = moepass.verify(Broken(1), torch.randn(4, D), train=False)
    assert not report.ok
    assert any("only when compiled" in c.detail for c in report.failures)


# --- the comparison itself -------------------------------------------------------------------------------------------


def test_a_mismatch_is_relative_and_infinite_for_what_cannot_be_compared():
    one = torch.tensor([1.0, -4.0])
    assert mismatch(one, one) == 0.0
    assert mismatch(one + 1e-3, one) == pytest.approx(2.5e-4, rel=1e-3)
    assert mismatch(torch.tensor([1.0, torch.nan]), one) == float("inf")
    assert mismatch(one[:1], one) == float("inf")
    assert mismatch(None, one) == 1.0, "a missing gradient is a zero gradient"
    assert mismatch(None, torch.zeros(2)) == 0.0


def test_a_gradient_that_ought_to_be_zero_is_measured_by_the_others_scale():
    expected = {"big": torch.ones(2), "zero": torch.zeros(2)}
    found = {"big": torch.ones(2), "zero": torch.full((2,), 1e-9)}
    assert worst_gradient(found, expected).error == pytest.approx(1e-6)


def test_memory_is_poisoned_inside_and_settings_come_back():
    with poisoned_memory():
        assert torch.empty(64).isnan().all()
        assert torch.ones(2).new_empty(64).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_equal_bits_see_a_difference_of_one():
    one = torch.ones(3)
    assert equal_bits([one, None], [one.clone(), None])
    assert not equal_bits([one], [torch.nextafter(one, 2 * one)])


def test_a_report_folds_what_passed_and_spells_out_what_failed():
    checks = (
        Check.within("a", "x: output", 1e-9, 1e-5),
        Check.within("a", "x: gradients", 1e-6, 1e-5),
        Check.within("a", "y", float("nan"), 1e-5, "gradient of w"),
    )
    report = VerifyReport(target="m", against="eager", checks=checks)
    text = report.to_text()
    assert "x (output, gradients)" in text
    assert "failed gradient of w" in text
    assert "not a number" in text
    assert report.headline == "FAILED: m against eager: 2 passed, 1 failed, 0 skipped"
    assert VerifyReport.model_validate_json(report.to_json()) == report
