"""Every reason code of ``site.REASONS`` on a graph of a few nodes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as nnf
from torch import nn
from tracing import D, F, codes, parameter, traced

from moepass.graph.dense import recognise
from moepass.graph.site import REASONS, Rejected

X = torch.randn(3, D)
UP, GATE, DOWN = (parameter(F, D), parameter(F, D), parameter(D, F))


def rejection_of(fn, *inputs) -> Rejected:
    found = recognise(traced(fn, *inputs))
    assert len(found) == 1, found
    assert isinstance(found[0], Rejected), found[0]
    return found[0]


def ungated(act):
    return lambda x, w1, w2: nnf.linear(act(nnf.linear(x, w1)), w2)


def other(x):
    return torch.cumsum(x, 0)


def weight_norm(x, w1, w2):
    return nnf.linear(torch.relu(nnf.linear(x, w1 * 2.0)), w2)


def hidden_escapes(x, w1, w2):
    h = torch.relu(nnf.linear(x, w1))
    return nnf.linear(h, w2), h


def mutated_behind_the_back(x, w1, w2):
    h = nnf.linear(x, w1)
    h.relu_()
    return nnf.linear(torch.tanh(h), w2)


def mutated_input(x, w1, w2):
    y = other(x)
    h = nnf.linear(y, w1)
    y.add_(1.0)
    return nnf.linear(torch.relu(h), w2), y


def mixed_biases(x, wg, wu, w2, b):
    return nnf.linear(nnf.silu(nnf.linear(x, wg, b)) * nnf.linear(x, wu), w2)


def gate_of_another(x, wg, wu, w2):
    return nnf.linear(nnf.silu(nnf.linear(other(x), wg)) * nnf.linear(x, wu), w2)


def spelled_rms_norm(h):
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)


def three(x, a, b, c, w2):
    return nnf.linear(torch.relu(nnf.linear(x, a)) * nnf.linear(x, b) * nnf.linear(x, c), w2)


class Unknown(torch.Tensor):
    """A subclass that nobody told us about."""


class Quantised(torch.Tensor):
    """A subclass whose name says what it is: see ``QuantisedTensor`` below."""


Quantised.__name__ = "Int8QuantizedTensor"


def held(node_name: str, tensor: torch.Tensor):
    """The ungated block with the example value of one weight replaced."""
    gm = traced(ungated(torch.relu), X, UP, DOWN)
    next(n for n in gm.graph.nodes if n.name == node_name).meta["val"] = tensor
    return recognise(gm, is_parameter=lambda n: n.name != "x")


def complex_of(w):
    return nn.Parameter(w.detach().cfloat())


REJECTIONS = [
    ("no_nonlinearity", ungated(lambda h: h), (X, UP, DOWN)),
    ("no_nonlinearity", ungated(lambda h: h * 2.0 + 1.0), (X, UP, DOWN)),
    ("width_changes", ungated(torch.tanh), (X, UP, parameter(2 * D, F))),
    ("hidden_escapes", hidden_escapes, (X, UP, DOWN)),
    ("inputs_differ", gate_of_another, (X, GATE, UP, DOWN)),
    ("not_pointwise", ungated(lambda h: nnf.layer_norm(torch.relu(h), (F,))), (X, UP, DOWN)),
    ("not_pointwise", ungated(lambda h: torch.softmax(h, -1)), (X, UP, DOWN)),
    ("not_pointwise", ungated(lambda h: spelled_rms_norm(torch.relu(h))), (X, UP, DOWN)),
    ("not_pointwise", ungated(lambda h: torch.relu(nnf.dropout(h, 0.1, True))), (X, UP, DOWN)),
    ("unknown_activation", ungated(torch.sin), (X, UP, DOWN)),
    ("unknown_activation", ungated(lambda h: nnf.softplus(h, 2.0)), (X, UP, DOWN)),
    ("unknown_activation", ungated(lambda h: nnf.celu(h)), (X, UP, DOWN)),
    ("tensor_in_program", lambda x, w1, s, w2: nnf.linear(torch.relu(nnf.linear(x, w1)) * s, w2),
     (X, UP, parameter(F), DOWN)),
    ("tensor_in_program", lambda x, w1, m, w2: nnf.linear(torch.relu(nnf.linear(x, w1)) + m, w2),
     (X, UP, torch.randn(3, F), DOWN)),
    ("cast_in_program", ungated(lambda h: torch.relu(h.double()).float()), (X, UP, DOWN)),
    ("too_many_projections", three, (X, GATE, UP, parameter(F, D), DOWN)),
    ("mixed_biases", mixed_biases, (X, GATE, UP, DOWN, parameter(F))),
    ("weight_not_parameter", weight_norm, (X, UP, DOWN)),
    ("weight_not_parameter", ungated(torch.relu), (X, torch.randn(F, D), DOWN)),
    ("weight_not_parameter", ungated(torch.relu), (X, UP, torch.randn(D, F))),
    ("non_floating", ungated(torch.sigmoid), (X.cfloat(), complex_of(UP), complex_of(DOWN))),
    ("shape_not_understood", ungated(lambda h: torch.relu(h.view(3, 2, F // 2)).view(3, F)), (X, UP, DOWN)),
    ("shape_not_understood", ungated(lambda h: torch.relu(h)[:, ::2]), (X, parameter(2 * F, D), DOWN)),
    ("shape_not_understood", ungated(lambda h: torch.relu(h)[:1]), (X, UP, DOWN)),
    ("shape_not_understood", ungated(lambda h: torch.relu(h.t())), (X, parameter(D, D), parameter(D, 3))),
    ("mutated", mutated_behind_the_back, (X, UP, DOWN)),
    ("mutated", mutated_input, (X, UP, DOWN)),
    ("widths_differ", lambda x, a, b, w2: nnf.linear(torch.relu(nnf.linear(x, a)) * nnf.linear(x, b), w2),
     (X, GATE, parameter(1, D), DOWN)),
]  # fmt: skip


@pytest.mark.parametrize(("code", "fn", "inputs"), REJECTIONS, ids=[f"{i}-{c[0]}" for i, c in enumerate(REJECTIONS)])
def test_a_near_miss_is_rejected_with_its_reason(code, fn, inputs):
    assert rejection_of(fn, *inputs).code == code


@pytest.mark.parametrize(
    ("code", "weight"),
    [
        ("tensor_subclass", UP.detach().as_subclass(Unknown)),
        ("quantised_weight", UP.detach().as_subclass(Quantised)),
        ("quantised_weight", torch.quantize_per_tensor(UP.detach(), 0.1, 0, torch.qint8)),
        ("quantised_weight", UP.detach().to(torch.float8_e4m3fn)),
        ("sparse_weight", UP.detach().to_sparse()),
        ("sparse_weight", UP.detach().to_sparse_csr()),
        ("non_floating", torch.ones(F, D, dtype=torch.int8)),
    ],
)
def test_a_weight_that_cannot_be_taken_is_rejected_with_its_reason(code, weight):
    assert codes(held("w1", weight)) == [code]


def test_a_sharded_weight_is_rejected_with_its_reason():
    sharded = type("DTensor", (torch.Tensor,), {})
    assert codes(held("w1", UP.detach().as_subclass(sharded))) == ["sharded_parameter"]


BORDERS = [
    (torch.amp.autocast_mode._enter_autocast, ("cpu", torch.bfloat16, True, None)),
    (torch._C._set_grad_enabled, (False,)),
]


@pytest.mark.parametrize(("border", "args"), BORDERS, ids=["autocast", "grad"])
@pytest.mark.parametrize(("before", "code"), [("linear", "site"), ("relu", "crosses_autocast"), ("output", "site")])
def test_a_block_may_stand_inside_a_mode_region_but_not_across_its_border(border, args, before, code):
    gm = traced(ungated(torch.relu), X, UP, DOWN)
    with gm.graph.inserting_before(next(n for n in gm.graph.nodes if n.name == before)):
        gm.graph.call_function(border, args)
    assert codes(recognise(gm)) == [code]


def test_every_reason_code_has_a_test():
    weights = {"tensor_subclass", "quantised_weight", "sparse_weight", "sharded_parameter"}
    assert {case[0] for case in REJECTIONS} | weights | {"crosses_autocast", "overlaps"} == set(REASONS)
