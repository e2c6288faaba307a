"""The one-line form on small hand-written models: the function, its gradients, MoE models, explain."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny import D, Net, assert_close, compiled, gradients
from torch import nn
from torch._inductor.custom_graph_pass import CustomGraphPass

import moepass
from moepass import _compat, errors
from moepass.attach import ATTRIBUTE


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


# --- the function and its gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])  # by Inductor: the next test, test_family_exactness.py
def test_one_line_rewrites_and_computes_the_dense_function(inner):
    model, x = Net(), torch.randn(3, 7, D)
    expected = model(x)
    assert_close(compiled(model, inner, strict=True)(x), expected)
    report = moepass.last_plan()
    assert report.summary == {"candidates": 2, "lowered": 2, "skipped": 0, "fallback": 0}
    assert [s.id for s in report.sites] == ["layers.0", "layers.1"]
    assert report.site("layers.0").activation == "silu(g)*u"
    assert report.site("layers.0").init == "virtual_groups, exact"


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])  # Inductor: test_backend_modes.py
def test_gradients_reach_input_experts_and_router_and_no_dense_ffn_weight(inner):
    model, x = Net(), torch.randn(64, D, requires_grad=True)
    y = compiled(model, inner)(x)
    assert_close(y, model(x))
    y.square().mean().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.parameters())
    moe = list(moepass.moe_parameters(model))
    assert len(moe) == 6
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in moe)
    for w_in in (p for p in moe if p.dim() == 3):
        assert (w_in.grad.flatten(1).abs().sum(1) > 0).all(), "an expert got no gradient"


def test_training_with_the_attached_parameters_lowers_the_loss_and_is_seen_by_the_graph():
    model, x, target = Net(), torch.randn(64, D), torch.randn(64, D)
    fast = compiled(model)
    with torch.no_grad():
        fast(x)
    optimizer = torch.optim.Adam(moepass.moe_parameters(model), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = F.mse_loss(fast(x), target)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


def test_materialize_keeps_the_function_and_the_optimizers_parameters():
    model, x = Net(), torch.randn(64, D)
    fast = compiled(model)
    fast(x).sum().backward()
    optimizer = torch.optim.SGD(moepass.moe_parameters(model), lr=0.1)
    optimizer.step()
    expected = fast(x).detach()
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    report = moepass.materialize(model)
    assert len(report.converted) == 2
    assert held == {id(p) for p in model.parameters()}
    assert_close(model(x), expected)
    assert_close(compiled(model)(x), expected)


def test_moe_parameters_before_the_first_forward_is_an_error_that_says_what_to_do():
    with pytest.raises(errors.NoState, match="run the model compiled"):
        moepass.moe_parameters(Net())


# --- models that already have MoE blocks -----------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_converted_model_is_planned_and_lowered_as_moe(inner):
    model, x = Net(), torch.randn(3, 16, D)
    expected = model(x)
    moepass.convert(model)
    fast = compiled(model, inner)
    assert_close(fast(x), expected)
    assert [(s.id, s.kind, s.status) for s in moepass.last_plan().sites] == [
        ("layers.0", "moe", "lowered"),
        ("layers.1", "moe", "lowered"),
    ]
    fast(x).square().sum().backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).square().sum().backward()
    for ours, eager in zip(got, gradients(model.parameters()), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)


def test_explain_plans_without_changing_the_model():
    model = Net()
    report = moepass.explain(model, hardware="H100", tokens=[1, 4096])(torch.randn(8, D))
    assert report.kind == "explain"
    assert report.hardware == "H100"
    assert report.summary["lowered"] == 2
    assert report.site("layers.0", 1).tokens.high == 1
    assert not any(ATTRIBUTE in p.__dict__ for p in model.parameters())
    with pytest.raises(errors.NoState):
        moepass.moe_parameters(model)


def test_explain_works_on_the_meta_device_and_again_on_the_same_model():
    with torch.device("meta"):
        model = Net()
    for _ in range(10):
        report = moepass.explain(model)(torch.randn(8, D, device="meta"))
        assert report.summary["lowered"] == 2


def test_ffns_that_feed_each_other_directly_are_all_rewritten():
    def block():
        return nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))

    model, x = nn.Sequential(block(), block(), block()), torch.randn(3, 8, D)
    assert_close(compiled(model, strict=True)(x), model(x))
    assert moepass.last_plan().summary["lowered"] == 3


def test_the_plan_stays_in_the_cache_key_beside_a_users_own_pass():
    ran = []

    class Mine(CustomGraphPass):
        def __call__(self, graph):
            ran.append(graph)

        def uuid(self):
            return "mine"

    patches = _compat.plan_key_patches("plan", {"post_grad_custom_post_pass": Mine(), "max_autotune": True})
    both = patches["post_grad_custom_post_pass"]
    both("graph")
    assert ran == ["graph"]
    assert "plan" in both.uuid()
    assert "mine" in both.uuid()
    assert patches["max_autotune"]
    assert _compat.plan_key_patches("plan", {})["post_grad_custom_post_pass"].uuid() == "plan"


def test_an_exported_converted_model_is_planned_whole():
    model, x = Net(), torch.randn(8, D)
    moepass.convert(model)
    expected = model(x)
    module = torch.export.export(model, (x,), strict=False).module()
    assert_close(compiled(module, fullgraph=False)(x), expected)
    assert moepass.last_plan().summary["lowered"] == 2


def test_materialize_and_moe_parameters_serve_a_model_that_is_converted_already():
    model = Net()
    moepass.convert(model)
    assert len(list(moepass.moe_parameters(model))) == 6
    assert {site.reason for site in moepass.materialize(model).skipped} == {"already_moe"}
