"""Models that change after compile, are cast, copied or saved: the attached state follows or is dropped cleanly."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tiny import FFN, WIDTH, D, Net, assert_close, compiled, fresh, statuses  # noqa: F401 -- fresh is a fixture
from torch import nn
from torch.nn.utils import parametrize

import moepass
from moepass import errors
from moepass.attach import attached_states
from moepass.spec import ExpertSpec, MoESpec


class LowRank(nn.Module):
    """``W + B A`` as a parametrisation."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4, columns)), nn.Parameter(torch.randn(rows, 4))

    def forward(self, weight):
        return weight + self.b @ self.a


class LoRA(nn.Module):
    """A linear with a low-rank bypass, as peft puts it in a Linear's place."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a, self.b = nn.Linear(base.in_features, 4, bias=False), nn.Linear(4, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


def test_parametrisation_added_after_compile_is_seen():
    model, x = Net(1), torch.randn(8, D)
    fast = compiled(model)
    assert_close(fast(x), model(x))
    parametrize.register_parametrization(model.layers[0].down, "weight", LowRank(D, WIDTH))
    assert_close(fast(x), model(x))
    assert statuses() == [("skipped", "weight_not_parameter")]
    parametrize.remove_parametrizations(model.layers[0].down, "weight", leave_parametrized=True)
    assert_close(fast(x), model(x))


@pytest.mark.parametrize("which", ["up", "down"])
def test_lora_put_in_the_place_of_a_linear_after_compile_is_seen(which):
    model, x = Net(1), torch.randn(8, D)
    fast = compiled(model)
    assert_close(fast(x), model(x))
    setattr(model.layers[0], which, LoRA(getattr(model.layers[0], which)))
    expected = model(x)
    assert_close(fast(x), expected)
    fast(x).square().sum().backward()
    adapter = getattr(model.layers[0], which)
    got = [adapter.a.weight.grad.clone(), adapter.b.weight.grad.clone()]
    model.zero_grad()
    model(x).square().sum().backward()
    torch.testing.assert_close(got[0], adapter.a.weight.grad, rtol=1e-4, atol=1e-4)


def test_a_buffer_registered_anew_is_seen():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.ffn = FFN()
            self.register_buffer("scale", torch.ones(D))

        def forward(self, x):
            return self.scale * self.ffn(x)

    model, x = Scaled(), torch.randn(8, D)
    fast = compiled(model)
    assert_close(fast(x), model(x))
    model.register_buffer("scale", torch.full((D,), 3.0))
    assert_close(fast(x), model(x))
    assert len(list(moepass.moe_parameters(model))) == 3


def test_casting_there_and_back_keeps_the_function_and_the_parameter_objects():
    model, x = Net(1), torch.randn(8, D)
    fast = compiled(model)
    expected = fast(x).detach()
    before = {id(p) for p in moepass.moe_parameters(model)}
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        model.to(dtype)
        actual = fast(x.to(dtype))
        assert actual.dtype == dtype
        assert_close(actual.float(), expected, tolerance)
        assert {p.dtype for p in moepass.moe_parameters(model)} == {dtype}
    assert {id(p) for p in moepass.moe_parameters(model)} == before


def trained(model, x):
    """A compiled model whose attached state took a step."""
    fast = compiled(model)
    fast(x).sum().backward()
    torch.optim.SGD(moepass.moe_parameters(model), lr=0.1).step()
    return fast


def test_saving_a_whole_model_leaves_the_attachment_behind_and_says_so(tmp_path, caplog):
    model, x = Net(1), torch.randn(8, D)
    trained(model, x)
    torch.save(model, tmp_path / "model.pt")
    assert "moepass.materialize" in caplog.text
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert not list(attached_states(loaded))
    assert list(attached_states(model))
    assert torch.equal(loaded(x), model(x))
    torch._dynamo.reset()
    assert_close(compiled(loaded)(x), loaded(x))
    torch.save(loaded, tmp_path / "again.pt")


def test_a_materialized_model_survives_save_and_load(tmp_path):
    model, x = Net(1), torch.randn(8, D)
    fast = trained(model, x)
    expected = fast(x).detach()
    moepass.materialize(model)
    torch.save(model, tmp_path / "model.pt")
    assert_close(torch.load(tmp_path / "model.pt", weights_only=False)(x), expected)


def test_state_dicts_and_pickled_parameters_hold_no_attachment(tmp_path):
    model, x = Net(1), torch.randn(8, D)
    compiled(model)(x)
    torch.save(model.state_dict(keep_vars=True), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert torch.equal(loaded["layers.0.down.weight"], model.layers[0].down.weight)
    parameter = pickle.loads(pickle.dumps(model.layers[0].down.weight))
    assert torch.equal(parameter, model.layers[0].down.weight)
    assert not list(attached_states(nn.ParameterList([parameter])))


def test_a_deep_copy_of_a_trained_model_starts_dense_and_leaves_the_original_alone():
    model, x = Net(1), torch.randn(8, D)
    fast = trained(model, x)
    expected = fast(x).detach()
    other = copy.deepcopy(model)
    assert not list(attached_states(other))
    assert_close(compiled(other)(x), other(x))
    assert_close(fast(x), expected)


def test_blocks_that_share_an_output_projection_keep_a_state_each():
    model, x = Net(2), torch.randn(64, D)
    model.layers[1].down = model.layers[0].down
    fast = compiled(model)
    assert_close(fast(x), model(x))
    fast(x).sum().backward()
    fast(x).sum().backward()
    parameters = list(moepass.moe_parameters(model))
    assert len(parameters) == 6
    assert all(p.grad is not None for p in parameters)


def test_materialize_refuses_blocks_that_share_an_output_projection_and_changes_nothing():
    model, x = Net(3), torch.randn(64, D)
    model.layers[1].down = model.layers[0].down
    fast = trained(model, x)
    expected, names = fast(x).detach(), list(model.state_dict())
    with pytest.raises(errors.CannotMaterialize, match="unchanged: its output projection serves another"):
        moepass.materialize(model)
    assert list(model.state_dict()) == names
    assert_close(fast(x), expected)
    assert len(list(moepass.moe_parameters(model))) == 9


def test_materialize_refuses_to_choose_between_the_states_of_two_specs():
    model, x = Net(1), torch.randn(64, D)
    for spec in (None, MoESpec(experts=ExpertSpec(num_experts=4))):
        compiled(model, **({} if spec is None else {"spec": spec}))(x)
    with pytest.raises(errors.CannotMaterialize, match="states of two specs"):
        moepass.materialize(model)
    assert isinstance(model.layers[0], FFN)


def test_materialize_leaves_states_of_weights_that_the_model_lost_behind():
    model, x = Net(1), torch.randn(8, D)
    fast = compiled(model)
    fast(x)
    lost = model.layers[0].up.weight
    model.layers[0].up.weight = nn.Parameter(torch.randn(WIDTH, D))
    expected = fast(x).detach()
    assert len(list(attached_states(model))) == 2
    assert len(moepass.materialize(model).converted) == 1
    assert_close(model(x), expected)
    assert lost.shape == (WIDTH, D)


def test_states_of_replaced_input_projections_are_let_go():
    model, x = Net(1), torch.randn(8, D)
    fast = compiled(model)
    for _ in range(3):
        fast(x)
        model.layers[0].up.weight = nn.Parameter(torch.randn(WIDTH, D))
    assert_close(fast(x), model(x))
    assert len(list(attached_states(model))) == 1
