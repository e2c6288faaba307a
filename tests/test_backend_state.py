"""Where the one-line form keeps its weights: shared graphs, re-assigned, updated, frozen, copied and tied weights."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import WIDTH, D, Net, assert_close, compiled
from torch import nn

import moepass
from moepass.attach import ATTRIBUTE


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


def test_two_instances_share_a_graph_and_stay_correct():
    one, two, x = Net(), Net(), torch.randn(8, D)
    assert_close(compiled(one)(x), one(x))
    assert_close(compiled(two)(x), two(x))
    assert_close(compiled(one)(x), one(x))


def test_layers_compiled_one_by_one_share_code_but_not_weights():
    model, x = Net(4), torch.randn(8, D)
    expected = model(x)
    for layer in model.layers:
        layer.compile(backend="moepass", options={"inner": "aot_eager"})
    assert_close(model(x), expected)
    states = {id(s.moe) for p in model.parameters() for s in p.__dict__.get(ATTRIBUTE, {}).values()}
    assert len(states) == 4


def test_re_assigned_weights_are_seen():
    model, x = Net(), torch.randn(8, D)
    fast = compiled(model)
    fast(x)
    model.layers[0].down.weight = nn.Parameter(torch.randn(D, WIDTH))
    model.layers[1].gate.weight = nn.Parameter(torch.randn(WIDTH, D))
    assert_close(fast(x), model(x))


def test_in_place_updates_are_seen():
    model, x = Net(), torch.randn(8, D)
    fast = compiled(model)
    fast(x)
    with torch.no_grad():
        model.layers[0].up.weight.mul_(1.5)
    model.layers[1].down.weight.data = torch.randn(D, WIDTH)
    assert_close(fast(x), model(x))
    model.load_state_dict(Net().state_dict())
    assert_close(fast(x), model(x))


def test_in_place_update_of_a_trained_state_warns(caplog):
    model, x = Net(1), torch.randn(8, D)
    fast = compiled(model)
    fast(x).sum().backward()
    torch.optim.SGD(moepass.moe_parameters(model), lr=0.1).step()
    with torch.no_grad():
        model.layers[0].up.weight.mul_(1.5)
    assert_close(fast(x), model(x))
    assert "changed in place after their MoE state had been trained" in caplog.text


def test_casting_the_model_keeps_a_trained_state():
    model, x = Net(1), torch.randn(8, D)
    fast = compiled(model)
    fast(x).sum().backward()
    torch.optim.SGD(moepass.moe_parameters(model), lr=0.1).step()
    expected = fast(x).detach()
    model.double()
    actual = fast(x.double())
    assert actual.dtype == torch.float64
    assert_close(actual.float(), expected, 1e-5)


def test_frozen_dense_weights_give_a_frozen_state():
    model, x = Net(1), torch.randn(8, D, requires_grad=True)
    model.requires_grad_(False)
    fast = compiled(model)
    fast(x).sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in moepass.moe_parameters(model))
    model.requires_grad_(True)
    fast(x).sum().backward()
    assert all(p.grad is not None for p in moepass.moe_parameters(model))


def test_a_deep_copy_starts_from_its_own_dense_weights():
    model, x = Net(1), torch.randn(8, D)
    compiled(model)(x)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.layers[0].down.weight.mul_(3.0)
    assert_close(compiled(other)(x), other(x))
    assert_close(compiled(model)(x), model(x))


def test_tied_ffns_share_one_state():
    model = Net(2)
    model.layers[1] = model.layers[0]
    x = torch.randn(64, D)
    assert_close(compiled(model)(x), model(x))
    compiled(model)(x).sum().backward()
    assert len(list(moepass.moe_parameters(model))) == 3
