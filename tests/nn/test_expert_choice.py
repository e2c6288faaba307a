"""Experts that choose their tokens: the router against the paper's loop, and both ways of computing the block."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moepass import errors, ops, reference
from moepass.nn import Router, expert_choice
from moepass.spec import DispatchSpec, RouterSpec, capacity

D, E, F = 5, 4, 3
SPEC = RouterSpec(choice="expert", normalize=None, top_k=2)


def router_of(scope="batch", factor=1.0, spec=SPEC, **dispatch):
    router = Router(D, E, spec, dispatch=DispatchSpec(capacity_factor=factor, scope=scope, **dispatch)).double()
    with torch.no_grad():
        router.weight.copy_(tokens(E, D, seed=9))
    return router


def tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("scope", "windows"), [("batch", [(0, 12)]), ("sequence", [(0, 6), (6, 12)])])
def test_every_expert_takes_the_tokens_with_the_highest_softmax_scores(scope, windows):
    router, x = router_of(scope), tokens(12, D)
    out = router(x, sequences=(2, 6))
    scores = torch.softmax(x @ router.weight.T, -1).detach()
    chosen = set()
    for start, stop in windows:
        C = capacity(1.0, stop - start, 2, E)
        for e in range(E):
            column = sorted(range(start, stop), key=lambda t, e=e: -float(scores[t, e]))
            chosen |= {(t, e) for t in column[:C]}
    assert len(chosen) == 24, "every expert is full"
    assert {(t, e) for t in range(12) for e in range(E) if out.index_TK[t, e] == e} == chosen
    assert {(t, e) for e in range(E) for t in out.token_EC[e].tolist()} == chosen
    for t in range(12):
        for e in range(E):
            assert out.weight_TK[t, e] == (scores[t, e] if (t, e) in chosen else 0.0)


def test_a_scope_of_sequences_asks_where_they_end():
    with pytest.raises(errors.NoSequences, match=r"nn\.Router needs to know where sequences end"):
        router_of("sequence")(tokens(12, D))


@given(st.sampled_from([0, 1, 3, 8]), st.sampled_from([0.2, 1.0, 5.0]), st.integers(0, 99), st.booleans())
def test_computing_chosen_rows_is_computing_all_slots_with_all_gradients(T, factor, seed, masked):
    router, x = router_of(factor=factor), tokens(T, D, seed=seed).requires_grad_()
    mask = tokens(T, seed=seed + 1) > 0 if masked else None
    weights = [(tokens(E, 2 * F, D, seed=2)).requires_grad_(), tokens(E, D, F, seed=3).requires_grad_()]
    out = router(x, mask)
    slots = ops.experts(x, out.index_TK, out.weight_TK, *weights, activation="swiglu")
    rows_x, rows_index = expert_choice.gather(x, out.token_EC)
    rows_weight = expert_choice.weights(out.weight_TK, out.token_EC)
    rows = ops.experts(rows_x, rows_index, rows_weight, *weights, activation="swiglu")
    chosen = expert_choice.combine(rows, out.token_EC, T)
    torch.testing.assert_close(chosen, slots)
    direction = tokens(T, D, seed=5)
    leaves = [x, router.weight, *weights]
    for a, b in zip(*(torch.autograd.grad((y * direction).sum(), leaves, retain_graph=True) for y in (chosen, slots)),
                    strict=True):  # fmt: skip
        torch.testing.assert_close(a, b)


def test_weights_have_the_gradient_of_the_scores_that_were_chosen():
    router, x = router_of(), tokens(6, D).requires_grad_()
    token_EC = router(x).token_EC

    def weights(x, weight):
        value = reference.choice_values(x @ weight.T, SPEC)
        return reference.routing_of_choice(value, token_EC, SPEC).weight_TK

    torch.testing.assert_close(weights(x, router.weight), router(x).weight_TK)
    assert torch.autograd.gradcheck(weights, (x, router.weight))


def test_ties_go_to_the_earlier_token():
    router = router_of(factor=0.5)
    out = router(torch.zeros(8, D, dtype=torch.float64))
    assert out.token_EC.tolist() == [[0, 1]] * E
