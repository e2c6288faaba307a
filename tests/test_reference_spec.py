"""The definition over the whole spec: against loops over Python numbers, for random specs."""

from __future__ import annotations

import math

import pytest
import reference_by_hand as by_hand
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from moepass import errors, reference
from moepass.reference import ExpertWeights, Extras, Routing, SharedWeights
from moepass.spec import DispatchSpec, ExpertSpec, MoESpec, RouterSpec, capacity

D, WIDTH = 5, 3
SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def routers(draw) -> tuple[RouterSpec, int]:
    """A router that chooses by token, and E."""
    groups, members = draw(st.sampled_from([1, 1, 2, 4])), draw(st.integers(2, 3))
    E = draw(st.sampled_from([1, 2, 5, 8])) if groups == 1 else groups * members
    kept = draw(st.integers(1, groups))
    kinds = ["top2", "max", "top_k_per_group"] if groups > 1 else ["top2"]
    group_score = draw(st.sampled_from(kinds))
    top_k = draw(st.integers(1, kept * (E // groups)))
    if group_score == "top_k_per_group":
        top_k = kept * draw(st.integers(1, E // groups))
    score, first = draw(st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"])), draw(st.booleans())
    normalize = draw(st.sampled_from([None, 1.0, 2.0, 3.5]))
    if top_k == 1:
        normalize, first = None, first or score == "softmax"
    return RouterSpec(
        top_k=top_k, score=score, score_first=first, normalize=normalize, groups=groups, kept_groups=kept,
        group_score=group_score, scale=draw(st.sampled_from([1.0, 2.5])), bias=draw(st.booleans()),
        normalize_eps=draw(st.sampled_from([0.0, 1e-3])) if normalize else 0.0,
    ), E  # fmt: skip


def numbers(seed: int, *shape: int, ties: bool = False) -> torch.Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (values * 2).round() if ties else values * 3


@given(routers(), st.integers(0, 6), SEEDS, st.booleans())
def test_route_is_the_loop_over_tokens(router, T, seed, ties):
    spec, E = router
    logits, bias = numbers(seed, T, E, ties=ties), numbers(seed + 1, E, ties=ties) / 4
    ours = reference.route(logits, spec, bias=bias if spec.bias else None)
    assert ours.index_TK.shape == ours.weight_TK.shape == (T, spec.top_k)
    for t in range(T):
        index, weight = by_hand.route(logits[t].tolist(), spec, bias.tolist() if spec.bias else [0.0] * E)
        assert ours.index_TK[t].tolist() == index
        assert ours.weight_TK[t].tolist() == pytest.approx(weight, rel=1e-12)


@given(routers(), SEEDS)
def test_a_rule_routes_like_its_spec(router, seed):
    spec, E = router
    logits = numbers(seed, 4, E)
    ours, theirs = reference.route(logits, reference.Rule.of(spec)), reference.route(logits, spec)
    assert torch.equal(ours.index_TK, theirs.index_TK)
    assert torch.equal(ours.weight_TK, theirs.weight_TK)


@given(routers(), SEEDS)
def test_weights_have_the_gradient_of_their_formula_and_the_choice_has_none(router, seed):
    spec, E = router
    logits, bias = numbers(seed, 3, E).requires_grad_(), numbers(seed + 1, E).requires_grad_()
    index = reference.route(logits, spec, bias=bias).index_TK

    def weights(logits: torch.Tensor) -> torch.Tensor:
        return reference.weigh(reference.choice_values(logits, spec), index, spec)

    torch.testing.assert_close(weights(logits), reference.route(logits, spec, bias=bias).weight_TK, rtol=0, atol=0)
    assert torch.autograd.gradcheck(weights, (logits,))
    grads = torch.autograd.grad(reference.route(logits, spec, bias=bias).weight_TK.sum(), [logits, bias],
                                allow_unused=True)  # fmt: skip
    assert grads[1] is None


def test_a_negative_biased_score_in_a_kept_group_beats_every_masked_expert():
    spec = RouterSpec(top_k=2, score="sigmoid", bias=True, groups=2, kept_groups=1, group_score="max")
    index = reference.route(torch.zeros(1, 4), spec, bias=torch.tensor([0.5, -9.0, 0.4, 0.4])).index_TK
    assert index.tolist() == [[0, 1]]


def test_a_sentinel_weighs_nothing_and_gets_no_gradient():
    logits = numbers(0, 2, 4).requires_grad_()
    spec = RouterSpec(normalize=None)
    weight = reference.weigh(reference.choice_values(logits, spec), torch.tensor([[4, 4], [1, 7]]), spec)
    assert weight[0].tolist() == [0.0, 0.0]
    assert weight[1, 1] == 0.0
    (grad,) = torch.autograd.grad(weight.sum(), logits)
    assert torch.count_nonzero(grad[0]) == 0
    assert torch.count_nonzero(grad[1]) == 4


@st.composite
def dispatches(draw, S: int) -> DispatchSpec:
    factor = draw(st.sampled_from([None, 0.3, 0.7, 1.0, 1.5]))
    scope = "batch" if factor is None else draw(st.sampled_from(["batch", "sequence", "subsequence"]))
    lengths = [n for n in range(1, S + 1) if S % n == 0] or [1]
    return DispatchSpec(
        capacity_factor=factor,
        drop_policy=draw(st.sampled_from(["position", "probability"])),
        scope=scope,
        subsequence_length=draw(st.sampled_from(lengths)) if scope == "subsequence" else None,
        ragged_buffer_factor=draw(st.sampled_from([None, 0.25, 0.6, 2.0])),
    )


@given(st.data(), st.integers(1, 3), st.sampled_from([0, 1, 4, 6]), st.integers(1, 5), SEEDS)
def test_what_is_kept_is_what_the_loop_keeps(data, B, S, E, seed):
    spec, K, T = data.draw(dispatches(S)), min(2, E), B * S
    index = torch.argsort(numbers(seed, T, E), dim=-1)[:, :K]
    index[numbers(seed + 1, T, K) > 3] = E  # sentinels
    weight = numbers(seed + 2, T, K, ties=True).abs()
    keep = reference.keep_mask(Routing(index, weight), E, spec, sequences=(B, S))
    window = {"batch": T, "sequence": S, "subsequence": spec.subsequence_length}[spec.scope]
    wanted = by_hand.kept(index.tolist(), weight.tolist(), E, spec, window)
    assert {tuple(p) for p in keep.nonzero().tolist()} == wanted


@given(st.integers(1, 2), st.sampled_from([0, 1, 5]), st.integers(1, 4), st.sampled_from([0.3, 1.0, 9.0]), SEEDS)
def test_experts_choose_the_tokens_that_the_loop_chooses(B, S, E, factor, seed):
    spec = RouterSpec(top_k=1, normalize=None, choice="expert", scale=2.0)
    logits, real = numbers(seed, B * S, E, ties=True), numbers(seed + 1, B * S) > -2.0
    value = reference.choice_values(logits, spec)
    C = capacity(factor, S, 1, E)
    token = reference.choose_tokens(value, C, (B, S), real)
    assert token.shape == (E, B * min(C, S))
    index, weight = reference.routing_of_choice(value, token, spec)
    wanted = by_hand.choose_tokens(value.tolist(), C, S, real.tolist()) if S else set()
    assert {(t, e) for t in range(B * S) for e in range(E) if index[t, e] == e} == wanted
    assert {(t, e) for e in range(E) for t in token[e].tolist() if t < B * S} == wanted
    assert (index[index != torch.arange(E)] == E).all()
    torch.testing.assert_close(weight, torch.where(index < E, 2.0 * value, 0.0))


# --- the block -------------------------------------------------------------------------------------------------------

E = 4


def drawn(spec: MoESpec, T: int = 6) -> tuple[torch.Tensor, torch.Tensor, ExpertWeights, Extras]:
    e, seeds = spec.experts, iter(range(100, 200))
    inner, shared = e.latent_size or D, e.shared_intermediate_size

    def draw(*shape: int) -> torch.Tensor:
        return (numbers(next(seeds), *shape) / 3).requires_grad_()

    weights = ExpertWeights(draw(E, 2 * WIDTH, inner), draw(E, inner, WIDTH), draw(E, 2 * WIDTH), draw(E, inner))
    gate = draw(1, D) if e.shared_combine == "gated" else None
    extras = Extras(
        output_scale=draw(E) if e.output_scale else None,
        shared=SharedWeights(draw(2 * shared, D), draw(D, shared), gate=gate) if shared else None,
        latent_in=draw(inner, D) if e.latent_size else None,
        latent_out=draw(D, inner) if e.latent_size else None,
    )
    return draw(T, D), draw(T, E), weights, extras


def swiglu_ffn(x: torch.Tensor, w: ExpertWeights | SharedWeights) -> torch.Tensor:
    h = F.linear(x, w.w_in, w.b_in)
    g, u = h.chunk(2)
    return F.linear(F.silu(g) * u, w.w_out, w.b_out)


def moe_by_hand(x, logits, weights, extras, spec: MoESpec, keep=None) -> torch.Tensor:
    rows = []
    for t in range(x.shape[0]):
        index, _ = by_hand.route(logits[t].tolist(), spec.router, [0.0] * E)
        weight = reference.weigh(reference.choice_values(logits[t : t + 1], spec.router), torch.tensor([index]),
                                 spec.router)[0]  # fmt: skip
        inner = x[t] if extras.latent_in is None else extras.latent_in @ x[t]
        y = torch.zeros_like(inner)
        for k, e in enumerate(index):
            if keep is not None and not keep[t, k]:
                continue
            one = ExpertWeights(*(w[e] for w in weights))
            out = swiglu_ffn(weight[k] * inner, one) if spec.router.weight_on == "input" else swiglu_ffn(inner, one)
            out = out if extras.output_scale is None else extras.output_scale[e] * out
            y = y + (out if spec.router.weight_on == "input" else weight[k] * out)
        y = y if extras.latent_out is None else extras.latent_out @ y
        if extras.shared is not None:
            s, K, how = swiglu_ffn(x[t], extras.shared), spec.router.top_k, spec.experts.shared_combine
            if how == "gated":
                s = torch.sigmoid(extras.shared.gate[0] @ x[t]) * s
            y = (s + K * y) / (K + 1) if how == "mixed" else y + s
        rows.append(y)
    return torch.stack(rows)


BLOCKS = {
    "Llama-4: weights on the input": ({"top_k": 1, "score": "sigmoid", "normalize": None, "weight_on": "input"}, {}),
    "weights on the input, two experts": ({"weight_on": "input"}, {}),
    "Gemma-4: a scale per expert": ({}, {"output_scale": True}),
    "scaled outputs, weights on the input": ({"weight_on": "input"}, {"output_scale": True}),
    "latent": ({}, {"latent_size": 3}),
    "shared, summed": ({}, {"shared_intermediate_size": 4}),
    "shared, gated": ({}, {"shared_intermediate_size": 4, "shared_combine": "gated"}),
    "shared, mixed": ({}, {"shared_intermediate_size": 4, "shared_combine": "mixed"}),
    "latent and shared": (
        {"score": "sqrtsoftplus", "scale": 2.0},
        {"latent_size": 3, "shared_intermediate_size": 4, "output_scale": True},
    ),
}


def block_spec(router: dict, experts: dict, **parts) -> MoESpec:
    return MoESpec(
        router=RouterSpec(**router),
        experts=ExpertSpec(num_experts=E, activation="swiglu", bias_in=True, bias_out=True, **experts),
        **parts,
    )


@pytest.mark.parametrize("name", BLOCKS)
def test_the_block_is_the_loop_over_tokens_with_all_its_gradients(name):
    spec = block_spec(*BLOCKS[name])
    x, logits, weights, extras = drawn(spec)
    more = [t for part in (*weights, *extras) for t in (part if isinstance(part, tuple) else (part,)) if t is not None]
    leaves = [x, logits, *more]
    ours, theirs = reference.moe(x, logits, weights, spec, extras), moe_by_hand(x, logits, weights, extras, spec)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    direction = numbers(7, *x.shape)
    for a, b in zip(*(torch.autograd.grad((y * direction).sum(), leaves) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_masked_token_gets_no_routed_output_takes_no_room_and_may_hold_nan():
    spec = block_spec({}, {}, dispatch=DispatchSpec(capacity_factor=0.5))
    x, logits, weights, extras = drawn(spec)
    real = torch.tensor([False, True, True, False, True, True])
    dirty_x, dirty_logits = (t.detach().clone() for t in (x, logits))
    dirty_x[~real] = dirty_logits[~real] = math.nan
    dirty_x.requires_grad_()
    y = reference.moe(dirty_x, dirty_logits, weights, spec, extras._replace(mask=real.view(2, 3)))
    assert torch.count_nonzero(y[~real]) == 0
    index = torch.where(real[:, None], reference.route(logits, spec.router).index_TK, E)
    weight = reference.route(logits, spec.router).weight_TK
    limit = capacity(0.5, 6, 2, E)
    assert limit == 2
    keep = reference.keep_mask(Routing(index, weight), E, spec.dispatch)
    assert 0 < keep.sum() < 8
    torch.testing.assert_close(y[real], moe_by_hand(x, logits, weights, extras, spec, keep)[real])
    grads = torch.autograd.grad(y.sum(), [dirty_x, *weights])
    assert all(g.isfinite().all() for g in grads)


def test_given_experts_are_used_with_weights_of_the_logits():
    spec = block_spec({"assignment": "random"}, {})
    x, logits, weights, extras = drawn(spec)
    with pytest.raises(ValueError, match=r"random.*index_TK"):
        reference.moe(x, logits, weights, spec, extras)
    index = torch.tensor([[3, 1]] * 6)
    y = reference.moe(x, logits, weights, spec, extras._replace(index_TK=index))
    p = torch.softmax(logits, -1)[:, [3, 1]]
    routing = Routing(index, p / p.sum(-1, keepdim=True))
    torch.testing.assert_close(y, reference.experts(x, routing, weights, block_spec({}, {})))


def test_uniform_assignment_goes_round_the_experts():
    spec = block_spec({"top_k": 3, "assignment": "uniform"}, {})
    x, logits, weights, _ = drawn(spec)
    index = torch.tensor([[0, 1, 2], [3, 0, 1], [2, 3, 0], [1, 2, 3], [0, 1, 2], [3, 0, 1]])
    torch.testing.assert_close(
        reference.moe(x, logits, weights, spec), reference.moe(x, logits, weights, spec, Extras(index_TK=index))
    )


def test_expert_choice_sums_what_the_experts_chose():
    spec = block_spec({"top_k": 1, "normalize": None, "choice": "expert"}, {},
                      dispatch=DispatchSpec(capacity_factor=1.0, scope="sequence"))  # fmt: skip
    x, logits, weights, _ = drawn(spec, T=8)
    y = reference.moe(x, logits, weights, spec, Extras(sequences=(2, 4)))
    p, wanted = torch.softmax(logits, -1), torch.zeros(8, D, dtype=torch.float64)
    for t, e in by_hand.choose_tokens(p.tolist(), 1, 4, [True] * 8):
        wanted[t] += p[t, e] * swiglu_ffn(x[t], ExpertWeights(*(w[e] for w in weights)))
    torch.testing.assert_close(y, wanted)
    with pytest.raises(errors.NoSequences, match="sequence"):
        reference.moe(x, logits, weights, spec)


@pytest.mark.parametrize(
    ("spec", "extras", "text"),
    [
        (block_spec({}, {"output_scale": True}), Extras(), "asks for output_scale"),
        (block_spec({}, {"latent_size": 3}), Extras(), "asks for latent_in"),
        (block_spec({}, {"shared_intermediate_size": 3}), Extras(), "asks for shared"),
        (block_spec({}, {}), Extras(output_scale=torch.ones(E)), "does not ask for output_scale"),
    ],
)
def test_spec_and_tensors_must_agree(spec, extras, text):
    x, logits, weights, _ = drawn(block_spec({}, {}))
    with pytest.raises(ValueError, match=text):
        reference.moe(x, logits, weights, spec, extras)
