"""Every supported family under torch.compile and torch.export: all FFNs, the right program, and nothing else."""

from __future__ import annotations

import pytest
import torch
from tracing import captured, error_of
from zoo import FAMILIES, FF, D, build

from moepass.graph.dense import recognise_all
from moepass.graph.names import parameter_fqn, site_id
from moepass.graph.site import DenseFFN

#: The innermost module that holds the first block's parameters.
FIRST_ID = {
    "llama": "model.layers.0.mlp",
    "gpt2": "transformer.h.0.mlp",
    "gpt_neox": "gpt_neox.layers.0.mlp",
    "opt": "model.decoder.layers.0",
    "bert": "encoder.layer.0",
    "vit": "layers.0.mlp",
    "t5": "encoder.block.0.layer.1.DenseReluDense",
    "t5_gated": "encoder.block.0.layer.1.DenseReluDense",
    "hand_written": "(root)",
}


def assert_complete(found, zoo, name, fqn=parameter_fqn) -> None:
    assert [item for item in found if not isinstance(item, DenseFFN)] == []
    assert [(s.program, s.D, s.F, s.dropout) for s in found] == [(zoo.program, D, FF, 0.0)] * zoo.sites
    first = site_id([fqn(p.weight) for p in (*found[0].ups, found[0].down)])
    assert first == FIRST_ID.get(name, "model.layers.0.mlp")


@pytest.mark.parametrize("name", FAMILIES)
def test_compile_finds_every_ffn_and_nothing_else(name):
    zoo = build(name)
    with torch.no_grad():
        (gm,) = captured(zoo.model, **zoo.inputs(7))
    found = [site for _, site in gm.meta["found"]]
    assert_complete(found, zoo, name)
    assert error_of(gm, gm.meta["inputs"], found) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_export_finds_every_ffn_and_nothing_else(name):
    zoo = build(name)
    without_cache = {"use_cache": False} if FAMILIES[name].kind in ("decoder", "seq2seq") else {}
    if name == "hand_written":
        without_cache = {}
    exported = torch.export.export(zoo.model, (), zoo.inputs(7) | without_cache)
    names = exported.graph_signature.inputs_to_parameters
    found = [site for _, site in recognise_all(exported.graph_module, is_parameter=lambda n: n.name in names)]
    assert_complete(found, zoo, name, lambda node: names[node.name])
    module = exported.module()
    assert_complete([site for _, site in recognise_all(module)], zoo, name)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "phi3", "hand_written"])
def test_dynamic_shapes_change_nothing(name):
    zoo = build(name)
    with torch.no_grad():
        (gm,) = captured(zoo.model, dynamic=True, **zoo.inputs(7))
    assert_complete([site for _, site in gm.meta["found"]], zoo, name)


def test_phi3_reads_gate_and_up_from_one_weight():
    zoo = build("phi3")
    with torch.no_grad():
        (gm,) = captured(zoo.model, **zoo.inputs(3))
    for _, site in gm.meta["found"]:
        assert [p.rows for p in site.ups] == [(0, FF), (FF, 2 * FF)]
        assert site.ups[0].weight is site.ups[1].weight


def test_gpt2_weights_lie_transposed_and_have_biases():
    zoo = build("gpt2")
    with torch.no_grad():
        (gm,) = captured(zoo.model, **zoo.inputs(3))
    for _, site in gm.meta["found"]:
        assert [p.transposed for p in (*site.ups, site.down)] == [True, True]
        assert [parameter_fqn(p.bias).rsplit(".", 2)[1] for p in (*site.ups, site.down)] == ["c_fc", "c_proj"]
