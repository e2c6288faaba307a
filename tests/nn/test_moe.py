"""``moepass.nn.MoE`` against the reference: outputs and every gradient, and under the compilers."""

from __future__ import annotations

import copy
import operator

import pytest
import torch
from torch import nn

from moepass import errors, reference
from moepass.nn import MoE
from moepass.spec import DispatchSpec, ExpertSpec, MoESpec, RouterSpec

D, F = 8, 12


def spec_of(E=4, k=2, activation="swiglu", bias=False, dropout=0.0, cf=None, policy="position", **router):
    return MoESpec(
        router=RouterSpec(top_k=k, **router),
        experts=ExpertSpec(
            num_experts=E, intermediate_size=F, activation=activation, bias_in=bias, bias_out=bias, dropout=dropout
        ),
        dispatch=DispatchSpec(capacity_factor=cf, drop_policy=policy),
    )


def moe_of(spec, dtype=torch.float64, seed=0):
    moe = MoE(D, spec, dtype=dtype)
    moe.reset_parameters(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        moe.router.weight.mul_(20.0)  # decisive logits: several experts, different weights
    return moe


def tokens(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype).requires_grad_()


def by_reference(moe, x):
    logits = x @ moe.router.weight.T
    return reference.moe(x, logits, reference.ExpertWeights(moe.w_in, moe.w_out, moe.b_in, moe.b_out), moe.spec)


def output_and_gradients(f, moe, x):
    y = f(x)
    weight = torch.linspace(-1.0, 1.0, y.numel(), dtype=y.dtype).view_as(y)
    return y, torch.autograd.grad((y * weight).sum(), [x, *moe.parameters()], materialize_grads=True)


CASES = {
    "default": {},
    "three dimensions are flattened": {"shape": (2, 3, D)},
    "no token": {"shape": (0, D)},
    "one token": {"shape": (1, D)},
    "all experts": {"k": 4},
    "one expert": {"E": 1, "k": 1, "normalize": None},
    "top-1 without normalisation": {"k": 1, "normalize": None},
    "top k first": {"score_first": False},
    "sigmoid, scaled": {"score": "sigmoid", "scale": 2.5},
    "L2 norm": {"normalize": 2.0},
    "ungated with biases": {"activation": "gelu", "bias": True},
    "gated with biases": {"bias": True},
    "squared relu": {"activation": "relu2"},
    "an expression": {"activation": "clamp(g, -1.0, 1.0)*sigmoid(1.7*g)*(u + 1.0)"},
    "capacity by position": {"cf": 0.6, "bias": True, "shape": (17, D)},
    "capacity by probability": {"cf": 0.6, "policy": "probability", "bias": True, "shape": (17, D)},
    "capacity of one": {"cf": 0.01, "shape": (5, D)},
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_all_gradients_equal_the_reference(case):
    options = dict(CASES[case])
    shape = options.pop("shape", (9, D))
    moe = moe_of(spec_of(**options))
    x = tokens(*shape)
    y, grads = output_and_gradients(moe, moe, x)
    expected, expected_grads = output_and_gradients(lambda x: by_reference(moe, x), moe, x)
    torch.testing.assert_close(y, expected)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad)


def test_expert_without_tokens_gets_zero_gradient():
    moe = moe_of(spec_of(E=4, k=2, bias=True))
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[1, 0], moe.router.weight[3, 0] = 5.0, 4.0
    x = tokens(6, D).detach().abs()
    moe(x).square().sum().backward()
    for parameter in (moe.w_in, moe.w_out, moe.b_in, moe.b_out):
        assert torch.count_nonzero(parameter.grad[[0, 2]]) == 0
        assert all(torch.count_nonzero(parameter.grad[e]) > 0 for e in (1, 3))


def test_bfloat16_module_stays_close_to_float64_and_routes_in_float32():
    moe = moe_of(spec_of(bias=True), dtype=torch.bfloat16)
    x = tokens(33, D, dtype=torch.bfloat16)
    index, weight, *_ = moe.router(x)
    assert weight.dtype == torch.float32
    assert index.dtype == torch.int64
    y = moe(x)
    assert y.dtype == torch.bfloat16
    wide = copy.deepcopy(moe).double()
    torch.testing.assert_close(y.double(), wide(x.double()), rtol=0.03, atol=0.01)


def test_router_logits_are_float32_under_autocast():
    moe = moe_of(spec_of(), dtype=torch.float32)
    x = tokens(5, D, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logits = moe.router.logits(x)
        assert moe(x).dtype == torch.bfloat16
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, x @ moe.router.weight.T)


def test_dropout_acts_in_training_only():
    moe = moe_of(spec_of(dropout=0.5), dtype=torch.float32)
    x = tokens(9, D, dtype=torch.float32)
    torch.testing.assert_close(moe.eval()(x), by_reference(moe, x))
    torch.manual_seed(0)
    first = moe.train()(x)
    assert not torch.allclose(first, by_reference(moe, x))
    torch.manual_seed(0)
    assert torch.equal(first, moe(x))


def test_compiles_in_one_graph_with_dynamic_tokens():
    """Under Inductor: ``tests/lowering/test_lowerings.py``."""
    moe = moe_of(spec_of(bias=True), dtype=torch.float32)
    compiled = torch.compile(moe, backend="aot_eager", fullgraph=True, dynamic=True)
    for T in (7, 2, 33):
        x = tokens(T, D, dtype=torch.float32)
        y, grads = output_and_gradients(compiled, moe, x)
        expected, expected_grads = output_and_gradients(moe, moe, x)
        torch.testing.assert_close(y, expected)
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_plain_block_traces_to_its_router_and_one_op(dynamic):
    graphs = []

    def keep(gm, _inputs):
        graphs.append(gm.graph)
        return gm

    torch.compiler.reset()
    torch.compile(moe_of(spec_of()), backend=keep, fullgraph=True, dynamic=dynamic)(tokens(2, 5, D))
    (graph,) = graphs
    calls = [n for n in graph.nodes if n.op.startswith("call") and n.target not in ("size", operator.getitem)]
    first, logits, *routing, experts, last = calls
    assert (first.target, last.target) == ("reshape", "reshape")
    assert logits.target == torch.ops.moepass.router_logits
    assert experts.target == torch.ops.moepass.experts
    assert experts.args[0] is logits.args[0] is first
    assert experts.args[2] is routing[-1]  # the weights as the router leaves them
    assert last.args[0] is experts


def test_exports_with_dynamic_tokens_as_one_semantic_node():
    moe = moe_of(spec_of(), dtype=torch.float32).eval()
    x = tokens(7, D, dtype=torch.float32).detach()
    program = torch.export.export(moe, (x,), dynamic_shapes=({0: torch.export.Dim("T")},))
    targets = [node.target for node in program.graph.nodes]
    assert targets.count(torch.ops.moepass.experts.default) == 1
    longer = tokens(19, D, dtype=torch.float32).detach()
    torch.testing.assert_close(program.module()(longer), moe(longer))


def test_is_safe_on_the_meta_device():
    moe = MoE(D, spec_of(bias=True), device="meta")
    moe.reset_parameters()
    y = moe(torch.empty(2, 5, D, device="meta"))
    assert y.shape == (2, 5, D)
    assert all(p.is_meta for p in moe.parameters())


def test_state_dict_has_the_documented_names_and_shapes():
    shapes = {name: tuple(t.shape) for name, t in MoE(D, spec_of(bias=True)).state_dict().items()}
    assert shapes == {
        "router.weight": (4, D),
        "w_in": (4, 2 * F, D),
        "w_out": (4, D, F),
        "b_in": (4, 2 * F),
        "b_out": (4, D),
    }
    assert "b_in" not in MoE(D, spec_of(activation="gelu")).state_dict()


def test_reset_is_reproducible_from_a_generator_and_leaves_the_global_one_alone():
    state = torch.get_rng_state()
    moe = MoE(D, spec_of(), device="meta").to_empty(device="cpu")
    moe.reset_parameters(torch.Generator().manual_seed(3))
    again = copy.deepcopy(moe)
    again.reset_parameters(torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(moe.parameters(), again.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_spec_without_width_or_activation_is_refused_by_name():
    with pytest.raises(errors.IncompleteSpec, match="intermediate_size"):
        MoE(D, MoESpec())
    with pytest.raises(errors.IncompleteSpec, match="activation"):
        MoE(D, MoESpec(experts=ExpertSpec(intermediate_size=4)))


def test_prints_what_it_is():
    text = repr(nn.Sequential(MoE(D, spec_of(cf=1.25, dropout=0.1))))
    for part in ("D=8, F=12, E=4, swiglu", "capacity_factor=1.25 (position)", "dropout=0.1", "top_k=2"):
        assert part in text
