"""Dense state dicts load into converted models: the same weights as ``convert`` makes, and clear refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from blocks import WIDTH, D, Gated, Raw, Spliced, Stack, TakesTwo, chain
from torch import nn

from moepass import errors
from moepass.nn import MoE
from moepass.spec import ExpertSpec, InitSpec, MoESpec, RouterSpec
from moepass.upcycle.accept import accept_dense
from moepass.upcycle.convert import convert

METHODS = ["virtual_groups", "copy", "split", "copy+noise", "drop"]


def converted(model, **options):
    """A converted copy."""
    model = copy.deepcopy(model)
    convert(model, **options)
    return model


def equal(a, b):
    """Whether two state dicts are the same bit for bit."""
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def blocks():
    """One of every form that ``convert`` takes."""
    whole = nn.Sequential(nn.Linear(D, WIDTH), nn.GELU(), nn.Linear(WIDTH, D))
    return [Gated(), Gated(bias=True), Spliced(), TakesTwo(), Raw(), whole, chain(nn.ReLU(), nn.Dropout(0.2))]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("block", blocks(), ids=lambda b: type(b).__name__)
def test_a_dense_state_gives_the_weights_that_convert_gives(block, method):
    other, dense = Stack(copy.deepcopy(block)), Stack(block)
    for p in other.parameters():
        nn.init.normal_(p)
    expected, model = converted(dense, init=method, seed=3), converted(other, init=method, seed=3)
    assert not equal(expected, model)
    with accept_dense(model):
        assert not any(model.load_state_dict(dense.state_dict(), strict=True))
    assert equal(expected, model)


def test_a_model_converted_on_meta_is_filled_with_assign():
    dense = Stack(Gated(bias=True), Spliced()).to(torch.bfloat16)
    model = copy.deepcopy(dense).to("meta")
    convert(model, init="drop")
    accept_dense(model)
    model.load_state_dict(dense.state_dict(), assign=True)
    assert equal(model, converted(dense, init="drop"))
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())


def test_the_state_of_the_converted_model_still_loads():
    model, trained = (converted(Stack(Gated(), chain(nn.GELU()), Spliced())) for _ in range(2))
    for p in trained.parameters():
        nn.init.normal_(p)
    accept_dense(model)
    model.load_state_dict(trained.state_dict(), strict=True)
    assert equal(model, trained)


def test_without_the_handle_a_dense_state_is_refused_by_torch_as_before():
    dense = Stack(Gated())
    model = converted(dense)
    handle = accept_dense(model)
    handle.remove()
    handle.remove()
    with pytest.raises(RuntimeError, match=r"Missing key.*router\.weight"):
        model.load_state_dict(dense.state_dict())


def test_the_given_dict_is_left_as_it_was():
    dense = Stack(Gated(), chain(nn.GELU()))
    model, state = converted(dense), dense.state_dict()
    names = list(state)
    with accept_dense(model):
        model.load_state_dict(state)
    assert list(state) == names


def test_strict_still_finds_missing_and_unexpected_keys_elsewhere():
    dense = Stack(Gated())
    model, state = converted(dense), dense.state_dict()
    state["blocks.0.other.weight"] = state.pop("head.weight")
    with accept_dense(model):
        with pytest.raises(RuntimeError, match=r"head\.weight"):
            model.load_state_dict(state)
        found = model.load_state_dict(state, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == (["head.weight"], ["blocks.0.other.weight"])
    assert equal(model, converted(dense))


def test_an_empty_state_changes_nothing_where_strict_is_off():
    model = converted(Stack(Gated()))
    before = copy.deepcopy(model)
    with accept_dense(model):
        found = model.load_state_dict({}, strict=False)
    assert "blocks.0.w_in" in found.missing_keys
    assert equal(model, before)


def _drop(name):
    return lambda state, _: state.pop(name)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_drop("blocks.1.up.weight"), r"blocks\.1: tensors of the dense block are missing \(blocks\.1\.up\.weight\)"),
        (lambda s, m: s.update({"blocks.1.w_in": m["blocks.1.w_in"]}), "both the dense block and the MoE"),
        (
            lambda s, _: s.update({"blocks.0.down.weight": torch.zeros(D, WIDTH + 1)}),
            r"shape \[16, 33\], not \[16, 32\] \(blocks\.0\.down\.weight\)",
        ),
        (
            lambda s, m: (
                [s.pop(n) for n in list(s) if n.startswith("blocks.1")]
                and s.update({n: t for n, t in m.items() if n.startswith("blocks.1")})
            ),
            "some blocks are dense in it and others are MoE",
        ),
    ],
    ids=["partial", "both", "shape", "some"],
)
def test_mixed_layouts_are_refused_before_anything_is_written(change, says, strict):
    dense = Stack(Gated(), Gated())
    model = converted(Stack(Gated(), Gated()))
    before, state = copy.deepcopy(model), dense.state_dict()
    change(state, converted(dense).state_dict())
    with accept_dense(model), pytest.raises(errors.MixedLayouts, match=says):
        model.load_state_dict(state, strict=strict)
    assert equal(model, before)


class OurNames(nn.Module):
    """A hand-written block whose parameters are called like those of the MoE."""

    def __init__(self):
        super().__init__()
        self.w_in, self.w_out = nn.Parameter(torch.randn(WIDTH, D)), nn.Parameter(torch.randn(D, WIDTH))

    def forward(self, x):
        return torch.relu(x @ self.w_in.t()) @ self.w_out.t()


def test_names_that_mean_both_layouts_are_told_apart_by_their_shapes():
    dense = Stack(OurNames())
    expected, model = converted(dense), converted(Stack(OurNames()))
    with accept_dense(model):
        model.load_state_dict(dense.state_dict())
        assert equal(model, expected)
        model.load_state_dict(converted(dense, seed=1).state_dict())
    assert equal(model, converted(dense, seed=1))


def test_shared_blocks_are_loaded_under_every_name():
    shared = Gated()
    dense = Stack(shared, Gated(), shared)
    expected, model = converted(dense), converted(dense, seed=1)
    model.blocks[0].origin = expected.blocks[0].origin
    model.blocks[1].origin = expected.blocks[1].origin
    with accept_dense(model):
        model.load_state_dict(dense.state_dict())
    assert equal(model, expected)
    assert model.blocks[0] is model.blocks[2]


@pytest.mark.parametrize("wrap", [False, True], ids=["part", "whole"])
def test_the_hook_works_from_below_and_from_above_the_converted_model(wrap):
    dense = Stack(Gated(), chain(nn.GELU()))
    expected, model = converted(dense), converted(Stack(Gated(), chain(nn.GELU())))
    outer, state = nn.ModuleDict({"inner": model}), {f"inner.{n}": t for n, t in dense.state_dict().items()}
    accept_dense(outer if wrap else model)
    outer.load_state_dict(state)
    assert equal(model, expected)
    part = converted(Stack(Gated(), chain(nn.GELU()))).blocks
    with accept_dense(part):
        part.load_state_dict(dense.blocks.state_dict())
    assert equal(part, expected.blocks)


def test_what_a_dense_block_has_no_weights_for_starts_as_convert_starts_it():
    spec = MoESpec(
        router=RouterSpec(bias=True, linear_bias=True),
        experts=ExpertSpec(num_experts=4, bias_in=True, bias_out=True, output_scale=True),
    )
    dense = Stack(Gated())
    expected, model = converted(dense, spec=spec), converted(Stack(Gated()), spec=spec)
    for tensor in model.state_dict().values():
        tensor.fill_(7.0)
    with accept_dense(model):
        model.load_state_dict(dense.state_dict())
    assert equal(model, expected)


def test_a_model_without_converted_blocks_is_refused():
    made = MoE(D, MoESpec(experts=ExpertSpec(num_experts=2, intermediate_size=4, activation="gelu")))
    for model in (Stack(Gated()), Stack(made)):
        with pytest.raises(errors.NoState):
            accept_dense(model)


def test_the_origin_survives_copies_and_names_every_dense_tensor():
    model = copy.deepcopy(converted(Stack(Gated(bias=True)), init=InitSpec(method="copy", seed=5)))
    origin = model.blocks[0].origin
    assert (origin.site, origin.init.seed) == ("blocks.0", 5)
    names = {f"blocks.0.{module}.{kind}" for module in ("gate", "up", "down") for kind in ("weight", "bias")}
    assert set(origin.places[0].names) == names
