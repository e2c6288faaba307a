"""``moepass.convert`` on every supported family: the same logits.  What learns: ``tests/test_family_exactness.py``."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
import zoo
from torch import Tensor, nn

from moepass.upcycle.convert import convert


def main_output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Logits, or the last hidden state of a model without a head."""
    out = model(**inputs)
    return out if isinstance(out, Tensor) else out[0] if "logits" not in out else out.logits


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_the_converted_model_computes_the_dense_logits(name):
    built = zoo.build(name)
    model = copy.deepcopy(built.model)
    report = convert(model)
    assert len(report.converted) == built.sites
    assert {site.activation for site in report.converted} == {built.program}
    assert report.exact
    assert all(site.E == 8 and site.K == 2 and zoo.FF == 2 * site.F for site in report.converted)
    with torch.no_grad():
        for T in (1, 7, 64, 513):
            expected = main_output(built.model, built.inputs(T))
            actual = main_output(model, built.inputs(T))
            assert float((actual - expected).abs().max()) <= 5e-6 * float(expected.abs().max())


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "bert", "t5_gated"])
def test_on_the_meta_device_the_same_blocks_are_found(name):
    built = zoo.build(name)
    with torch.device("meta"):
        meta = zoo.FAMILIES[name].make()
    found = convert(meta).converted
    assert [site.where for site in found] == [site.where for site in convert(built.model).converted]
    assert all(p.is_meta for p in meta.parameters())


def test_equal_layers_are_traced_once(monkeypatch):
    calls = []
    export = torch.export.export
    monkeypatch.setattr(
        torch.export, "export", lambda module, *a, **k: calls.append(type(module)) or export(module, *a, **k)
    )
    count = {}
    for layers in (2, 6):
        calls.clear()
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4
        )
        assert len(convert(transformers.LlamaForCausalLM(config)).converted) == layers
        count[layers] = len(calls)
    assert count[6] == count[2]


def test_gradient_checkpointing_does_not_hide_the_blocks():
    built = zoo.build("opt")
    built.model.gradient_checkpointing_enable()
    assert len(convert(built.model.train()).converted) == built.sites
