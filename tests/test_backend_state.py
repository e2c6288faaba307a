"""Where the one-line form keeps its weights: shared graphs, re-assigned, updated, frozen, copied and tied weights."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import WIDTH, D, Net, assert_close, compiled, fresh  # noqa: F401 -- fresh is a fixture
from torch import nn

import moepass
from moepass import errors
from moepass.attach import ATTRIBUTE, DenseTensors, attached_states, detached_on_failure, state_for


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


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.name.startswith("moepass") and r.levelname == "WARNING"]


def steps(fast, optimizers, count=2):
    for _ in range(count):
        fast(torch.randn(64, D)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()


def test_an_optimizer_without_the_moe_weights_is_named_at_its_second_step(caplog):
    model = Net()
    fast = compiled(model)
    optimizer = torch.optim.AdamW(model.parameters())
    steps(fast, [optimizer], count=1)
    assert not warnings_of(caplog)
    steps(fast, [optimizer], count=3)
    (text,) = warnings_of(caplog)
    assert "AdamW steps without the MoE weights of layers.0 and 1 more, which" in text
    assert "moepass.moe_parameters(model)" in text


def test_optimizers_that_train_the_moe_weights_hear_nothing(caplog):
    model = Net()
    fast = compiled(model)
    fast(torch.randn(64, D))
    dense = torch.optim.SGD(model.parameters(), lr=0.1)  # steps first, and holds none of them
    steps(fast, [dense, torch.optim.SGD(moepass.moe_parameters(model), lr=0.1)], count=4)
    other = Net()
    fast = compiled(other)
    fast(torch.randn(64, D))
    steps(fast, [torch.optim.SGD([*other.parameters(), *moepass.moe_parameters(other)], lr=0.1)], count=4)
    assert not warnings_of(caplog)


def test_evaluation_and_frozen_blocks_hear_nothing(caplog):
    model, head, x = Net(), nn.Linear(D, D), torch.randn(64, D)
    fast = compiled(model)
    for train in (True, False):
        model.requires_grad_(train)
        optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.1)
        for _ in range(3):
            with torch.no_grad():
                y = fast(x)
            head(y).sum().backward()
            optimizer.step()
    assert not warnings_of(caplog)


def test_an_optimizer_step_compiles_as_before():
    model = Net()
    compiled(model)(torch.randn(64, D))
    head = nn.Linear(D, D)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    head(torch.randn(3, D)).sum().backward()
    before = head.weight.detach().clone()
    torch.compile(optimizer.step, backend="eager")()
    assert not torch.equal(head.weight, before)


def test_what_a_failed_compile_attached_is_detached_and_what_hung_there_before_stays():
    model, other, x = Net(), Net(1), torch.randn(8, D)
    compiled(model)(x)
    before = [state for _, state in attached_states(model)]
    recipe = before[0].recipe
    ffn = other.layers[0]
    dense = DenseTensors((ffn.gate.weight, ffn.up.weight), (None, None), ffn.down.weight, None)

    def compile_and_fail():
        with detached_on_failure():
            state_for(recipe, dense)
            state_for(recipe, before[0].dense)
            assert len(list(attached_states(other))) == 1
            raise RuntimeError("codegen")

    with pytest.raises(RuntimeError, match="codegen"):
        compile_and_fail()
    assert not list(attached_states(other))
    with pytest.raises(errors.NoState):
        moepass.moe_parameters(other)
    assert [state for _, state in attached_states(model)] == before
    with detached_on_failure():
        kept = state_for(recipe, dense)
    assert [state for _, state in attached_states(other)] == [kept]


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
