"""Names of parameters and sites."""

from __future__ import annotations

import pytest
import torch
from torch.fx import Graph

from moepass.graph.names import parameter_fqn, site_id


class Source:
    def __init__(self, name: str) -> None:
        self.name = name


def placeholder(source: str | None = None, name: str = "p"):
    node = Graph().placeholder(name)
    if source is not None:
        node._dynamo_source = Source(source)
    return node


@pytest.mark.parametrize(
    ("source", "fqn"),
    [
        ("L['self']._modules['mlp']._modules['0']._parameters['weight']", "mlp.0.weight"),
        ("G['model']._modules['a']._buffers['scale']", "a.scale"),
        ("L['self']._modules['_orig_mod']._modules['fc']._parameters['bias']", "fc.bias"),
        ("L['self'].inner._modules['fc']._parameters['bias']", "fc.bias"),
        ("L['x']", None),
        ("L['kwargs']['weights'][0]", None),
    ],
)
def test_the_source_of_a_placeholder_gives_its_name(source, fqn):
    assert parameter_fqn(placeholder(source)) == fqn


def test_a_computed_tensor_has_no_name():
    graph = Graph()
    assert parameter_fqn(graph.call_function(torch.relu, (graph.placeholder("x"),))) is None


@pytest.mark.parametrize(
    ("names", "site"),
    [
        (["m.layers.0.mlp.up.weight", "m.layers.0.mlp.down.weight"], "m.layers.0.mlp"),
        (["m.layers.0.fc1.weight", "m.layers.0.fc2.bias"], "m.layers.0"),
        (["m.layers.1.mlp.w1", "m.layers.1.mlp.w2"], "m.layers.1.mlp"),
        (["m.layers.1.up.weight", "m.layers.10.down.weight"], "m.layers"),
        (["0.weight", "2.weight"], "(root)"),
        ([], "(root)"),
    ],
)
def test_a_site_is_named_after_the_innermost_module_that_holds_it(names, site):
    assert site_id(names) == site
