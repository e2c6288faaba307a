"""``convert(model, existing=True)`` on every family: logits and all gradients stay those of transformers' loops."""

from __future__ import annotations

import functools

import pytest
import torch
from moe_zoo import FAMILIES, WITH_INTERFACE, WITHOUT_INTERFACE, build, inputs
from torch import nn

import moepass
from moepass.upcycle.existing import families

#: Modules that stay outside, by family, with the reason code.
LEFT = {"jetmoe": ("self_attention.experts", "not_runnable")}  # a mixture of attention heads, not of feed-forwards


@functools.cache
def converted(name: str) -> tuple[nn.Module, nn.Module, moepass.ConversionReport]:
    """transformers' model, ours, and the report."""
    ours = build(name, "eager")
    return build(name, "eager"), ours, moepass.convert(ours, existing=True)


def run(model, name, T):
    model.zero_grad(set_to_none=True)
    y = model(**inputs(name, T), use_cache=False).logits
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(T))
    (y * weight).sum().backward()
    return y.detach(), {n: p.grad for n, p in model.named_parameters()}


def assert_close(actual, expected, tolerance=1e-5):
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1.0)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_moe_layer_is_converted_or_named(name):
    _, ours, report = converted(name)
    assert len(report.converted) == ours.config.num_hidden_layers, report
    assert {site.way for site in report.converted} == {"interface" if name in WITH_INTERFACE else "adapter"}
    for site in report.skipped:
        suffix, reason = LEFT[name]
        assert site.id.endswith(suffix)
        assert site.reason == reason


@pytest.mark.parametrize("T", [1, 5, 64, 257])
@pytest.mark.parametrize("name", WITHOUT_INTERFACE)
def test_adapters_give_the_same_logits_and_gradients(name, T):
    theirs, ours, _ = converted(name)
    (expected, theirs_grads), (actual, ours_grads) = run(theirs, name, T), run(ours, name, T)
    assert_close(actual, expected)
    if name == "dbrx":
        theirs_grads = {key: grad for key, grad in theirs_grads.items() if ".experts." not in key}
    for key, grad in theirs_grads.items():
        if grad is not None:
            assert_close(ours_grads[key], grad)


def test_the_stacked_weights_of_dbrx_get_the_gradients_of_their_parts():
    theirs, ours, _ = converted("dbrx")
    (_, theirs_grads), (_, ours_grads) = run(theirs, "dbrx", 64), run(ours, "dbrx", 64)
    stem = "transformer.blocks.0.ffn.experts"
    w1, v1, w2 = (theirs_grads[f"{stem}.mlp.{part}"].view(8, 48, 32) for part in ("w1", "v1", "w2"))
    assert_close(ours_grads[f"{stem}.w_in"], torch.cat([w1, v1], dim=1))
    assert_close(ours_grads[f"{stem}.w_out"], w2)


@pytest.mark.parametrize("name", ["llama4_text", "jetmoe"])
def test_state_dict_keys_stay_where_weights_are_used_in_place(name):
    theirs, ours, _ = converted(name)
    assert theirs.state_dict().keys() == ours.state_dict().keys()


@pytest.mark.parametrize("name", ["llama4_text", "dbrx"])
def test_after_conversion_there_is_no_graph_break(name):
    theirs, ours, _ = converted(name)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    with torch.no_grad():
        logits = compiled(**inputs(name, 33), use_cache=False).logits
        assert_close(logits, theirs(**inputs(name, 33), use_cache=False).logits)


def test_the_feed_forward_of_jetmoe_no_longer_counts_on_the_host():
    _, ours, _ = converted("jetmoe")
    torch._dynamo.reset()
    x = torch.randn(1, 9, 32)
    block = ours.model.layers[0].mlp
    assert_close(torch.compile(block, backend="eager", fullgraph=True)(x), block(x))


@pytest.mark.parametrize("name", ["dbrx", "jetmoe"])  # Llama4ForCausalLM returns none
def test_router_logits_are_still_recorded(name):
    theirs, ours, _ = converted(name)
    recorded = [m(**inputs(name, 9), use_cache=False, output_router_logits=True) for m in (theirs, ours)]
    expected, actual = (out.router_logits for out in recorded)
    assert len(actual) == len(expected) > 0
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b)


def test_an_adapter_that_does_not_fit_its_class_any_more_is_refused(monkeypatch):
    model = build("jetmoe")

    def forward(self, layer_input):
        return 2 * type(self).before(self, layer_input)

    block = type(model.model.layers[0].mlp)
    monkeypatch.setattr(block, "before", block.forward, raising=False)
    monkeypatch.setattr(block, "forward", forward)
    with pytest.warns(UserWarning, match="changed nothing"):
        report = moepass.convert(model, existing=True)
    assert {site.reason for site in report.skipped if site.id.endswith("mlp")} == {"adapter_failed"}
    assert isinstance(model.model.layers[0].mlp, block)
    assert not isinstance(model.model.layers[0].mlp, families.JetMoeMoE)


def test_one_setting_serves_all_layers_so_a_selection_converts_none():
    model = build("olmoe", "eager")
    with pytest.warns(UserWarning, match="changed nothing"):
        report = moepass.convert(model, existing=True, layers="model.layers.0.*")
    assert {site.reason for site in report.skipped} == {"shared_setting", "not_selected"}
    assert model.config._experts_implementation == "eager"
