"""Every lowering against ``moepass.reference`` in float64: outputs, all gradients, and the awkward shapes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import moepass.ops
from moepass import pointwise, reference
from moepass.lowering import planner
from moepass.lowering.base import ExpertArgs
from moepass.lowering.registry import lowerings
from moepass.nn import MoE
from moepass.spec import DispatchSpec, ExpertSpec, MoESpec, RouterSpec

DROPLESS = ["dense", "gathered", "grouped"]
ACTIVATIONS = ["swiglu", "gelu", "relu2", "gelu_tanh(g)*u", "sigmoid(g)*g + 0.5*u"]


@dataclass
class Case:
    spec: MoESpec
    x: Tensor
    logits: Tensor
    weights: reference.ExpertWeights
    sentinel_TK: Tensor | None = None  # where not -2: the index to write over the router's choice

    @classmethod
    def random(cls, spec: MoESpec, T: int, *, D: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64) -> Case:
        generator = torch.Generator().manual_seed(seed)
        e, F = spec.experts, spec.experts.intermediate_size
        assert F is not None
        E, n = e.num_experts, e.n_projections

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

        weights = reference.ExpertWeights(
            draw(E, n * F, D),
            draw(E, D, F),
            draw(E, n * F) if e.bias_in else None,
            draw(E, D) if e.bias_out else None,
        )
        return cls(spec, draw(T, D), draw(T, E), weights)

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in (self.x, self.logits, *self.weights) if t is not None]

    def routing(self) -> reference.Routing:
        index_TK, weight_TK = reference.route(self.logits, self.spec.router)
        if self.sentinel_TK is not None:
            index_TK = torch.where(self.sentinel_TK == -2, index_TK.to(self.sentinel_TK.dtype), self.sentinel_TK)
        return reference.Routing(index_TK, weight_TK)

    def expected(self) -> Tensor:
        if self.sentinel_TK is None:
            return reference.moe(self.x, self.logits, self.weights, self.spec)
        return reference.experts(self.x, self.routing(), self.weights, self.spec)

    def actual(self, lowering: str) -> Tensor:
        index_TK, weight_TK = self.routing()
        dispatch = self.spec.dispatch
        args = ExpertArgs(
            *self.weights,
            activation=str(self.spec.experts.activation),
            capacity_factor=dispatch.capacity_factor or 0.0,
            drop_policy=dispatch.drop_policy,
        )
        return lowerings()[lowering].build(self.x, index_TK, weight_TK, args)


def spec(
    E: int, K: int, activation: str = "swiglu", bias: bool = False, cf: float | None = None, **dispatch
) -> MoESpec:
    return MoESpec(
        router=RouterSpec(top_k=K, normalize=None if K == 1 else 1.0),
        experts=ExpertSpec(num_experts=E, intermediate_size=8, activation=activation, bias_in=bias, bias_out=bias),
        dispatch=DispatchSpec(capacity_factor=cf, **dispatch),
    )


def assert_same_function(case: Case, lowering: str, tolerance: float = 1e-12) -> None:
    expected, actual = case.expected(), case.actual(lowering)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    upstream = upstream.to(expected.dtype)
    wanted = torch.autograd.grad(expected, case.leaves, upstream)
    got = torch.autograd.grad(actual, case.leaves, upstream)
    for theirs, ours in zip(wanted, got, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("lowering", DROPLESS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_dropless_lowering_equals_the_reference_with_all_gradients(lowering, activation, bias):
    assert_same_function(Case.random(spec(5, 2, activation, bias), T=13), lowering)


@pytest.mark.parametrize("lowering", DROPLESS)
@pytest.mark.parametrize(("E", "K", "T"), [(8, 2, 0), (8, 2, 1), (4, 4, 9), (1, 1, 5), (64, 2, 3)])
def test_dropless_lowering_is_right_at_the_edges_of_shape(lowering, E, K, T):
    assert_same_function(Case.random(spec(E, K, bias=True), T=T), lowering)


@pytest.mark.parametrize("policy", ["position", "probability"])
@pytest.mark.parametrize("cf", [0.3, 0.7, 1.0, 4.0])
@pytest.mark.parametrize("bias", [False, True])
def test_capacity_drops_exactly_what_the_reference_drops(policy, cf, bias):
    case = Case.random(spec(4, 2, "swiglu", bias, cf, drop_policy=policy), T=17)
    assert_same_function(case, "capacity")


@pytest.mark.parametrize("T", [0, 1])
def test_capacity_serves_no_token_and_one_token(T):
    assert_same_function(Case.random(spec(4, 2, cf=1.0), T=T), "capacity")


@given(
    E=st.integers(1, 9),
    T=st.integers(0, 20),
    data=st.data(),
    activation=st.sampled_from(ACTIVATIONS),
    bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_random_specs_and_shapes_agree_with_the_reference(E, T, data, activation, bias, seed):
    K = data.draw(st.integers(1, E), label="K")
    cf = data.draw(st.none() | st.floats(0.1, 3.0), label="capacity_factor")
    policy = data.draw(st.sampled_from(["position", "probability"]), label="policy")
    case = Case.random(spec(E, K, activation, bias, cf, drop_policy=policy), T=T, seed=seed)
    for lowering in DROPLESS if cf is None else ["capacity"]:
        assert_same_function(case, lowering)


@given(
    E=st.integers(1, 9),
    T=st.integers(0, 20),
    data=st.data(),
    share=st.sampled_from([0.1, 0.5, 1.0]),
    dtype=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 2**16),
)
def test_random_pairs_without_an_expert_agree_with_the_reference(E, T, data, share, dtype, seed):
    K = data.draw(st.integers(1, E), label="K")
    cf = data.draw(st.none() | st.floats(0.1, 3.0), label="capacity_factor")
    policy = data.draw(st.sampled_from(["position", "probability"]), label="policy")
    activation, bias = data.draw(st.sampled_from(ACTIVATIONS)), data.draw(st.booleans(), label="bias")
    case = Case.random(spec(E, K, activation, bias, cf, drop_policy=policy), T=T, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    outside = E + torch.randint(0, 3, (T, K), generator=generator)
    case.sentinel_TK = torch.where(torch.rand(T, K, generator=generator) < share, outside, -2).to(dtype)
    for lowering in DROPLESS if cf is None else ["capacity"]:
        assert_same_function(case, lowering)


@pytest.mark.parametrize("lowering", DROPLESS)
def test_expert_without_tokens_gets_zero_gradient(lowering):
    case = Case.random(spec(4, 1, bias=True), T=6)
    with torch.no_grad():
        case.logits[:, 3] = -100.0
    case.actual(lowering).sum().backward()
    for weight in case.weights:
        assert weight.grad is not None
        assert torch.equal(weight.grad[3], torch.zeros_like(weight.grad[3]))
        assert weight.grad.abs().sum() > 0


def test_dense_ignores_the_overflow_of_an_expert_that_nobody_chose():
    case = Case.random(spec(3, 1), T=4)
    with torch.no_grad():
        case.logits[:, 2] = -100.0
        case.weights.w_in[2] = 1e300
        case.weights.w_out[2] = 1e300
    assert_same_function(case, "dense")


@pytest.mark.parametrize("lowering", [*DROPLESS, "capacity"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_low_precision_stays_near_the_float64_reference(lowering, dtype, tolerance):
    chosen = spec(4, 2, bias=True, cf=1.0 if lowering == "capacity" else None)
    case = Case.random(chosen, T=32, D=16, dtype=dtype)
    wide = Case(
        chosen,
        case.x.double(),
        case.logits.double(),
        reference.ExpertWeights(*(None if w is None else w.double() for w in case.weights)),
    )
    actual, expected = case.actual(lowering), wide.expected()
    assert actual.dtype == dtype
    assert (actual.double() - expected).abs().max() <= tolerance * expected.abs().max()
    actual.sum().backward()
    assert all(leaf.grad is not None and leaf.grad.dtype == leaf.dtype for leaf in case.leaves)


@pytest.mark.parametrize("lowering", DROPLESS)
def test_transposed_and_interleaved_weights_need_no_copy(lowering):
    case = Case.random(spec(4, 2, "gpt_oss", bias=True), T=9)
    w = case.weights
    F = 8

    def interleave(t: Tensor) -> Tensor:  # gate rows, up rows -> alternating
        return torch.stack([t[:, :F], t[:, F:]], dim=2).flatten(1, 2)

    foreign = reference.ExpertWeights(
        interleave(w.w_in).transpose(1, 2).contiguous().transpose(1, 2),
        w.w_out.transpose(1, 2).contiguous().transpose(1, 2),
        interleave(w.b_in),
        w.b_out,
    )
    index, weight = reference.route(case.logits, case.spec.router)
    args = ExpertArgs(*foreign, activation=pointwise.canonical("gpt_oss"), interleaved=True)
    actual = lowerings()[lowering].build(case.x, index, weight, args)
    torch.testing.assert_close(actual, case.expected(), rtol=1e-12, atol=1e-12)


def test_dropout_on_the_hidden_activations_keeps_the_mean():
    torch.manual_seed(0)
    case = Case.random(spec(2, 2, "relu"), T=1)
    index, weight = reference.route(case.logits, case.spec.router)
    x = case.x.detach().expand(4000, -1)
    index, weight = index.expand(4000, -1), weight.detach().expand(4000, -1)
    dropped = moepass.ops.experts(x, index, weight, *case.weights, activation="relu", dropout=0.5)
    plain = case.expected()
    assert dropped.std(0).max() > 0
    torch.testing.assert_close(dropped.mean(0), plain[0], rtol=0.1, atol=0.2 * float(plain.detach().abs().max()))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_semantic_op_runs_under_plain_compilers_with_one_graph_for_many_token_counts(backend):
    block = MoE(6, spec(4, 2, bias=True))
    graphs = []

    def counting(gm, inputs):
        graphs.append(gm)
        return torch._dynamo.lookup_backend(backend)(gm, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(block, backend=counting, fullgraph=True, dynamic=True)
    first = None
    for T in (12, 5, 31):
        x = torch.randn(T, 6, requires_grad=True)
        wanted = torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()])
        got = torch.autograd.grad(compiled(x).square().sum(), [x, *block.parameters()])
        for ours, theirs in zip(got, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
        first = first or len(graphs)  # dynamic=True may trace twice to specialise floats
    assert len(graphs) == first


def test_an_eager_call_is_planned_in_the_dtype_and_mode_that_it_runs_in(monkeypatch):
    planned = []
    monkeypatch.setattr(planner, "choose", lambda work, hw: planned.append((work.dtype, work.train)) or "grouped")
    case = Case.random(spec(4, 2), T=8, dtype=torch.float32)
    operands = (case.x.detach(), *(t.detach() for t in case.routing()), *case.weights)
    moepass.ops.experts(*operands, activation="swiglu")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        moepass.ops.experts(*operands, activation="swiglu")
    assert planned == [("float32", True), ("bfloat16", False)]


def test_autocast_casts_the_experts_but_not_the_router():
    case = Case.random(spec(4, 2), T=8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logits = moepass.ops.router_logits(case.x, torch.randn(4, 6))
        index, weight = reference.route(logits, case.spec.router)
        y = moepass.ops.experts(case.x, index, weight, *case.weights, activation="swiglu")
    assert logits.dtype == torch.float32
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert case.weights.w_in.grad.dtype == torch.float32
