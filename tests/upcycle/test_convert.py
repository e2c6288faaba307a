"""``moepass.convert`` on hand-written modules: what is found, what is chosen, and where the MoE goes."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from blocks import WIDTH, D, FunctionalDropout, Gated, Raw, Spliced, Stack, TakesTwo, chain, converted
from torch import nn

from moepass.nn import MoE
from moepass.upcycle.convert import convert


@pytest.mark.parametrize(
    ("block", "where"),
    [
        (Gated(), "blocks.0"),
        (Gated(bias=True), "blocks.0"),
        (Spliced(), "blocks.0.moe"),
        (TakesTwo(), "blocks.0.moe"),
        (Raw(), "blocks.0"),
        (nn.Sequential(nn.Linear(D, WIDTH), nn.GELU(), nn.Linear(WIDTH, D)), "blocks.0"),
        (chain(nn.GELU()), "blocks.0.1"),
        (chain(nn.ReLU(), nn.Dropout(0.2)), "blocks.0.1"),
        (chain(nn.Sequential(nn.SiLU(), nn.Identity()), bias=False), "blocks.0.1"),
    ],
    ids=[
        "module",
        "biases",
        "splice",
        "arguments",
        "raw parameters",
        "sequential",
        "chain",
        "chain with dropout",
        "nested activation",
    ],
)
def test_blocks_are_found_wherever_they_are_and_the_function_stays(block, where):
    model = Stack(block)
    dense = {id(p) for p in block.parameters() if max(p.shape) == WIDTH}
    report, change = converted(model)
    assert [site.where for site in report.converted] == [where]
    assert report.exact
    assert change < 1e-6
    moe = model.get_submodule(where)
    assert isinstance(moe, MoE)
    assert dense
    assert dense.isdisjoint(id(p) for p in model.parameters())
    assert {id(p) for p in moe.parameters()} <= {id(p) for p in model.parameters()}
    assert sum(p.numel() for p in moe.parameters()) == report.parameters_after


def test_a_spliced_forward_keeps_its_other_arguments():
    block = TakesTwo()
    twin = copy.deepcopy(block)
    model = Stack(block)
    convert(model)
    x = torch.randn(3, D)
    torch.testing.assert_close(model.blocks[0](x, scale=-2.0), twin(x, scale=-2.0))


def test_dropout_inside_the_block_moves_into_the_experts_and_dropout_behind_it_stays():
    model = Stack(chain(nn.ReLU(), nn.Dropout(0.2)))
    convert(model.eval())
    moe = model.blocks[0][1]
    assert moe.spec.experts.dropout == 0.2
    assert not moe.training
    assert isinstance(model.blocks[0][3], nn.Identity)
    assert model.blocks[0][5].p == 0.1


def test_the_spliced_module_keeps_its_class_and_can_be_copied_and_trained():
    model = Stack(Spliced())
    convert(model)
    assert type(model.blocks[0]) is Spliced
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.blocks[0].moe.w_out.zero_()
    x = torch.randn(3, D)
    assert not torch.allclose(model.eval()(x), twin.eval()(x))
    torch.testing.assert_close(twin(x), twin.head(x))


def test_two_blocks_of_one_forward_are_both_spliced():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(D, WIDTH), nn.Linear(WIDTH, D)
            self.c, self.d = nn.Linear(D, WIDTH), nn.Linear(WIDTH, D)
            self.norm = nn.LayerNorm(D)

        def forward(self, x):
            x = x + self.b(F.gelu(self.a(x)))
            return x + self.d(F.relu(self.c(self.norm(x))))

    model = Stack(Two())
    report, change = converted(model)
    assert [(s.id, s.where, s.activation) for s in report.converted] == [
        ("blocks.0.a", "blocks.0.moe", "gelu(g)"),
        ("blocks.0.c", "blocks.0.moe_1", "relu(g)"),
    ]
    assert change < 1e-6


def test_a_chain_in_the_root_module_is_converted_and_a_root_that_is_the_block_says_why_not():
    root = chain(nn.GELU())
    assert [s.where for s in converted(root)[0].converted] == ["1"]
    with pytest.warns(UserWarning, match="changed nothing"):
        report = convert(Gated())
    assert [(s.id, s.reason) for s in report.skipped] == [("(root)", "root_module")]


def test_a_block_without_a_boundary_is_left_alone_with_a_hint():
    model = Stack(FunctionalDropout())
    text = repr(model)
    with pytest.warns(UserWarning, match="one-line form"):
        report = convert(model)
    assert report.converted == ()
    assert ("blocks.0", "no_module_boundary") in {(s.id, s.reason) for s in report.skipped}
    assert repr(model) == text


def test_near_misses_are_reported_with_their_codes_and_nothing_is_taken():
    class Lora(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(D, 4, bias=False), nn.Linear(4, D, bias=False)

        def forward(self, x):
            return self.b(self.a(x))

    with pytest.warns(UserWarning, match="changed nothing"):
        report = convert(Stack(Lora()))
    assert {(s.id, s.reason) for s in report.skipped} == {("blocks.0.b", "no_nonlinearity")}


def test_a_second_call_changes_nothing_and_says_why():
    model = Stack(Gated(), chain(nn.GELU()))
    convert(model)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = convert(model)
    assert again.converted == ()
    assert {(s.id, s.reason) for s in again.skipped} == {("blocks.0", "already_moe"), ("blocks.1.1", "already_moe")}
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"every": 2}, [1, 3]),
        ({"every": 5}, [4]),
        ({"layers": "blocks.1, blocks.3"}, [1, 3]),
        ({"layers": ["blocks.[0-2]"]}, [0, 1, 2]),
        ({"layers": "blocks.[1-4]", "every": 2}, [2, 4]),
    ],
)
def test_globs_and_every_nth_choose_the_blocks_in_model_order(options, expected):
    report, change = converted(Stack(*(Gated() for _ in range(5))), **options)
    assert [s.id for s in report.converted] == [f"blocks.{i}" for i in expected]
    left = [f"blocks.{i}" for i in range(5) if i not in expected]
    assert [s.id for s in report.skipped if s.reason == "not_selected"] == left
    assert change < 1e-6


def test_a_module_shared_between_layers_stays_shared():
    shared = Gated()
    model = Stack(shared, Gated(), shared)
    report, change = converted(model)
    assert change < 1e-6
    assert model.blocks[0] is model.blocks[2]
    assert isinstance(model.blocks[0], MoE)
    assert len(report.converted) == 2


def test_two_modules_with_the_same_parameters_share_one_moe():
    model = Stack(Gated(), Gated())
    for name in ("gate", "up", "down"):
        getattr(model.blocks[1], name).weight = getattr(model.blocks[0], name).weight
    report, change = converted(model)
    assert change < 1e-6
    assert len(report.converted) == 2
    assert model.blocks[0] is model.blocks[1]


def test_a_weight_that_is_tied_to_something_else_is_not_untied():
    model = Stack(Gated(), nn.Linear(WIDTH, D, bias=False))
    model.blocks[1].weight = model.blocks[0].down.weight
    with pytest.warns(UserWarning, match="tied_weight"):
        report = convert(model)
    assert ("blocks.0", "tied_weight") in {(s.id, s.reason) for s in report.skipped}
    assert isinstance(model.blocks[0], Gated)


def test_instances_that_differ_only_in_their_settings_are_not_confused():
    class Activated(nn.Module):
        def __init__(self, fn):
            super().__init__()
            self.a, self.b, self.fn = nn.Linear(D, WIDTH), nn.Linear(WIDTH, D), fn

        def forward(self, x):
            return self.b(self.fn(self.a(x)))

    report, change = converted(Stack(Activated(F.relu), Activated(F.gelu), Activated(F.relu)))
    assert [s.activation for s in report.converted] == ["relu(g)", "gelu(g)", "relu(g)"]
    assert change < 1e-6
