"""One name for every spelling, and which calls write in place."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from torch.fx import Graph

from moepass.graph.vocabulary import build, is_torch_pointwise, mutated, name_of
from moepass.pointwise import Var, canonical, fold, unparse

torch.library.define("moepass_test::silu", "(Tensor x) -> Tensor")  # same name, another namespace


def call(target, *args, **kwargs):
    graph = Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    swap = {"x": x, "y": y}
    make = graph.call_method if isinstance(target, str) else graph.call_function
    return make(target, tuple(swap.get(a, a) if isinstance(a, str) else a for a in args), kwargs)


def somebody_elses(x):
    return x


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("linear", torch._C._nn.linear),
        ("linear", F.linear),
        ("linear", torch.ops.aten.linear.default),
        ("gelu", torch._C._nn.gelu),
        ("gelu", torch.ops.aten.gelu.default),
        ("relu", torch.relu),
        ("relu", F.relu),
        ("relu", torch.Tensor.relu),
        ("relu", "relu_"),
        ("relu", torch.ops.aten.relu_.default),
        ("silu", F.silu),
        ("mul", operator.mul),
        ("mul", operator.imul),
        ("mul", torch.multiply),
        ("mul", "__rmul__"),
        ("mul", "__imul__"),
        ("sub", "subtract"),
        ("div", operator.truediv),
        ("matmul", operator.matmul),
        ("rsqrt", "rsqrt"),
        ("reciprocal", torch.reciprocal),
        ("pow", torch.ops.aten.pow.Tensor_Scalar),
        (None, somebody_elses),
        (None, torch.ops.moepass_test.silu.default),
    ],
)
def test_every_spelling_has_one_name(name, target):
    assert name_of(call(target, "x", "y")) == name


@pytest.mark.parametrize(
    ("node", "writes"),
    [
        (call("relu_", "x"), ["x"]),
        (call(operator.iadd, "x", "y"), ["x"]),
        (call("__iadd__", "x", "y"), ["x"]),
        (call("__invert__", "x"), []),
        (call(F.relu, "x", True), ["x"]),
        (call(F.relu, "x", inplace=True), ["x"]),
        (call(F.relu, "x"), []),
        (call(operator.setitem, "x", 0, "y"), ["x"]),
        (call(torch.ops.aten.add_.Tensor, "x", "y"), ["x"]),
        (call(torch.ops.aten.add.Tensor, "x", "y"), []),
        (call("__init__", "x"), []),
    ],
)
def test_writes_in_place_are_seen(node, writes):
    assert [changed.name for changed in mutated(node)] == writes


@pytest.mark.parametrize(
    ("method", "program"),
    [
        ("__rsub__", "1.0 - g"),
        ("__rtruediv__", "1.0/g"),
        ("__sub__", "g - 1.0"),
        ("__rmul__", "g"),
        ("rsub", "1.0 - g"),
    ],
)
def test_a_reflected_operand_is_put_back(method, program):
    node = call(method, "x", 1.0)
    assert unparse(fold(build(node, lambda a: Var("g") if a is node.args[0] else a))) == canonical(program)


@pytest.mark.parametrize(
    ("target", "answer"),
    [(torch.sin, True), (torch.softmax, False), (torch.cumsum, False), (somebody_elses, None)],
)
def test_torch_knows_what_is_pointwise(target, answer):
    assert is_torch_pointwise(call(target, "x", 0)) is answer
