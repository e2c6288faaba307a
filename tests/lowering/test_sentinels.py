"""Pairs without an expert (an index outside 0..E-1) are not computed: every lowering, eager and compiled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import moepass.lowering.inline
import moepass.ops
from moepass import reference
from moepass.lowering.base import ExpertArgs
from moepass.lowering.registry import lowerings
from moepass.spec import DispatchSpec, ExpertSpec, MoESpec

LOWERINGS = ["dense", "gathered", "grouped", "capacity"]
T, K, E, D, F = 9, 2, 4, 6, 8


class Operands:
    """Leaves of one call in float64, with some pairs and all pairs of tokens 2 and 5 without an expert."""

    def __init__(self, bias: bool = True, dtype: torch.dtype = torch.int64, tokens: int = T) -> None:
        generator = torch.Generator().manual_seed(tokens)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

        self.x, self.weight = draw(tokens, D), draw(tokens, K)
        self.w_in, self.w_out = draw(E, 2 * F, D), draw(E, D, F)
        self.b_in, self.b_out = (draw(E, 2 * F), draw(E, D)) if bias else (None, None)
        index = torch.rand(tokens, E, generator=generator).argsort(1)[:, :K]
        index[torch.rand(tokens, K, generator=generator) < 0.3] = E
        index[2::3] = E
        self.index = index.to(dtype)

    @property
    def leaves(self) -> list[Tensor]:
        mine = (self.x, self.weight, self.w_in, self.w_out, self.b_in, self.b_out)
        return [t for t in mine if t is not None]

    def build(self, lowering: str, x: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        cf = 0.9 if lowering == "capacity" else 0.0
        args = ExpertArgs(self.w_in, self.w_out, self.b_in, self.b_out, "silu(g)*u", capacity_factor=cf)
        x, weight = self.x if x is None else x, self.weight if weight is None else weight
        return lowerings()[lowering].build(x, self.index, weight, args)

    def expected(self, lowering: str) -> Tensor:
        cf = 0.9 if lowering == "capacity" else None
        spec = MoESpec(
            experts=ExpertSpec(num_experts=E, intermediate_size=F, activation="silu(g)*u"),
            dispatch=DispatchSpec(capacity_factor=cf),
        )
        weights = reference.ExpertWeights(self.w_in, self.w_out, self.b_in, self.b_out)
        return reference.experts(self.x, reference.Routing(self.index, self.weight), weights, spec)


def gradients(y: Tensor, leaves: list[Tensor], upstream: Tensor | None = None) -> tuple[Tensor, ...]:
    if upstream is None:
        upstream = torch.linspace(-1.0, 1.0, y.numel(), dtype=y.dtype).view_as(y)
    return torch.autograd.grad(y, leaves, upstream, materialize_grads=True)


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("bias", [False, True])
def test_output_and_gradients_equal_the_reference(lowering, dtype, bias):
    case = Operands(bias, dtype)
    y, expected = case.build(lowering), case.expected(lowering)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients(y, case.leaves), gradients(expected, case.leaves))


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("sentinel", [E, E + 5, 2**31 - 1, -1])
def test_any_index_outside_the_experts_is_a_sentinel(lowering, sentinel):
    case = Operands()
    expected = case.build(lowering)
    case.index = torch.where(case.index == E, sentinel, case.index)
    assert torch.equal(case.build(lowering), expected)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_garbage_in_what_is_not_computed_reaches_nothing(lowering):
    case = Operands()
    off_TK = case.index == E
    off_T = off_TK.all(1)
    assert off_T.any()
    assert (off_TK & ~off_T[:, None]).any()
    expected = case.expected(lowering)
    upstream = torch.linspace(-1.0, 1.0, T * D, dtype=torch.float64).view(T, D)
    wanted = gradients(expected, case.leaves, upstream)
    x = torch.where(off_T[:, None], torch.nan, case.x.detach()).requires_grad_()
    weight = torch.where(off_TK, torch.inf, case.weight.detach()).requires_grad_()
    y = case.build(lowering, x, weight)
    torch.testing.assert_close(y, expected)
    got = gradients(y, [x, weight, *case.leaves[2:]], torch.where(off_T[:, None], torch.nan, upstream))
    torch.testing.assert_close(got, wanted)
    assert torch.count_nonzero(got[0][off_T]) == 0
    assert torch.count_nonzero(got[1][off_TK]) == 0


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_without_any_expert_everything_is_zero(lowering, tokens):
    case = Operands(tokens=tokens)
    case.index = torch.full((tokens, K), E)
    x = torch.full((tokens, D), torch.nan, dtype=torch.float64, requires_grad=True)
    y = case.build(lowering, x)
    grads = gradients(y, [x, *case.leaves[1:]])
    assert all(torch.count_nonzero(t) == 0 for t in (y, *grads))


@pytest.mark.parametrize("policy", ["position", "probability"])
def test_a_sentinel_takes_no_capacity(policy):
    case = Operands(bias=False)
    index = torch.tensor([[E, 0], [0, E], [E, E], [0, 1]])  # C = ceil(0.5*4*2/4) = 1
    args = ExpertArgs(case.w_in, case.w_out, None, None, "silu(g)*u", capacity_factor=0.5, drop_policy=policy)
    weight = torch.tensor([[9.0, 0.5], [0.4, 9.0], [9.0, 9.0], [0.3, 0.2]], dtype=torch.float64)
    y = lowerings()["capacity"].build(case.x[:4], index, weight, args)
    assert [bool(row.any()) for row in y] == [True, False, False, True]  # 0 -> token 0, 1 -> token 3


@pytest.mark.parametrize("lowering", ["dense", "gathered", "grouped"])
def test_an_expert_named_twice_by_one_token_adds_up(lowering):
    case = Operands()
    case.index = torch.where(case.index == E, E, case.index[:, :1])
    y, expected = case.build(lowering), case.expected(lowering)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients(y, case.leaves), gradients(expected, case.leaves))


def test_the_eager_op_and_autocast_take_sentinels():
    case = Operands()
    y = moepass.ops.experts(case.x, case.index, case.weight, case.w_in, case.w_out, activation="silu(g)*u")
    case.b_in = case.b_out = None
    torch.testing.assert_close(y, case.expected("grouped"))
    with torch.autocast("cpu", torch.bfloat16):
        leaves = [t.detach().float() for t in (case.x, case.weight, case.w_in, case.w_out)]
        low = moepass.ops.experts(leaves[0], case.index, *leaves[1:], activation="silu(g)*u")
    assert (low.double() - y).abs().max() <= 0.05 * y.abs().max()


@pytest.mark.parametrize(
    ("lowering", "backend"), [*((name, "aot_eager") for name in LOWERINGS), ("grouped", "inductor")]
)
def test_compiled_with_many_token_counts_one_graph_and_the_same_numbers(lowering, backend):
    graphs = []

    def counting(gm, inputs):
        graphs.append(gm)
        return torch._dynamo.lookup_backend(backend)(gm, inputs)

    op = moepass.lowering.inline.lowered_op(lowering)
    cf = 0.9 if lowering == "capacity" else 0

    @torch.compile(backend=counting, fullgraph=True, dynamic=True)
    def run(x, index, weight, w_in, w_out, b_in, b_out):
        return op(x, index, weight, w_in, w_out, b_in, b_out, "silu(g)*u", 0, cf, "position", False)

    torch._dynamo.reset()
    first = None
    for tokens in (9, 4, 23):
        case = Operands(tokens=tokens, dtype=torch.int32)
        y = run(case.x, case.index, case.weight, case.w_in, case.w_out, case.b_in, case.b_out)
        expected = case.expected(lowering)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(gradients(y, case.leaves), gradients(expected, case.leaves))
        first = first or len(graphs)  # dynamic=True may trace twice to specialise floats
    assert len(graphs) == first
