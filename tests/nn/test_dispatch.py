"""``moepass.nn.dispatch.drop`` against a loop in plain Python over every scope, policy and shape."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import moepass.ops
from moepass import errors, reference
from moepass.lowering.base import ExpertArgs
from moepass.lowering.registry import lowerings
from moepass.nn.dispatch import drop
from moepass.spec import DispatchSpec


def by_hand(index, weight, E, spec, sequences):
    """The same by loops: nested lists with E where a pair is dropped."""
    T, K = index.shape
    rows = [(t, k, int(index[t, k]), float(weight[t, k])) for t in range(T) for k in range(K)]
    rows = [row for row in rows if 0 <= row[2] < E]
    if spec.capacity_factor is not None:
        S = T if spec.scope == "batch" else sequences[1]
        L = spec.subsequence_length or S
        room = Counter()
        limit = max(1, math.ceil(spec.capacity_factor * L * K / E))
        kept = []
        for row in sorted(rows, key=lambda r: -r[3]) if spec.drop_policy == "probability" else rows:
            room[row[0] // max(L, 1), row[2]] += 1
            if room[row[0] // max(L, 1), row[2]] <= limit:
                kept.append(row)
        rows = sorted(kept)
    if spec.ragged_buffer_factor is not None:
        rows = sorted(rows, key=lambda r: (r[2], r[0], r[1]))[: math.ceil(spec.ragged_buffer_factor * T * K)]
    out = [[E] * K for _ in range(T)]
    for t, k, e, _ in rows:
        out[t][k] = e
    return out


def routing(T, K, E, seed=0, dtype=torch.int64, skew=0.0, sentinels=0.0, levels=4):
    """Random assignment without repeats in a token, leaning towards low experts; weights tie often."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(T, E, generator=generator) - skew * torch.arange(E)
    index = scores.argsort(1, descending=True)[:, :K].to(dtype)
    index[torch.rand(T, K, generator=generator) < sentinels] = E
    weight = torch.randint(1, levels + 1, (T, K), generator=generator).float() / levels
    return index, weight


def check(index, weight, E, spec, sequences=None):
    got = drop(index, weight, E, spec, sequences)
    assert got.index_TK.tolist() == by_hand(index, weight, E, spec, sequences)
    assert (got.dropped.shape, got.dropped.dtype, got.index_TK.dtype) == ((), torch.int64, index.dtype)
    lost = (got.index_TK == E).sum() - ((index < 0) | (index >= E)).sum()
    assert got.dropped == lost
    return got


@given(
    B=st.integers(1, 4),
    chunks=st.integers(0, 3),
    length=st.integers(1, 5),
    E=st.integers(1, 6),
    data=st.data(),
    policy=st.sampled_from(["position", "probability"]),
    scope=st.sampled_from(["batch", "sequence", "subsequence"]),
    cf=st.none() | st.floats(0.05, 3.0),
    ragged=st.none() | st.floats(0.05, 1.5),
    skew=st.sampled_from([0.0, 0.3]),
    sentinels=st.sampled_from([0.0, 0.3, 1.0]),
    dtype=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 2**16),
)
def test_random_policies_drop_what_the_loop_drops(
    B, chunks, length, E, data, policy, scope, cf, ragged, skew, sentinels, dtype, seed
):
    K = data.draw(st.integers(1, E), label="K")
    S = chunks * length
    index, weight = routing(B * S, K, E, seed, dtype, skew, sentinels)
    scope = "batch" if cf is None else scope
    spec = DispatchSpec(
        capacity_factor=cf,
        drop_policy=policy,
        scope=scope,
        subsequence_length=length if scope == "subsequence" else None,
        ragged_buffer_factor=ragged,
    )
    got = check(index, weight, E, spec, (B, S))
    if S > 0:
        kept = reference.keep_mask(reference.Routing(index, weight), E, spec, sequences=(B, S))
        assert torch.equal(got.index_TK, torch.where(kept, index, E))


def test_each_sequence_has_its_own_capacity():
    index = torch.zeros(8, 1, dtype=torch.int64)  # all want expert 0
    weight = torch.tensor([[1.0], [2.0], [4.0], [3.0]] * 2)
    sequence = DispatchSpec(capacity_factor=1.0, scope="sequence")  # C = ceil(4*1/2) = 2 each
    assert check(index, weight, 2, sequence, (2, 4)).index_TK.flatten().tolist() == [0, 0, 2, 2, 0, 0, 2, 2]
    best = DispatchSpec(capacity_factor=1.0, scope="sequence", drop_policy="probability")
    assert check(index, weight, 2, best, (2, 4)).index_TK.flatten().tolist() == [2, 2, 0, 0, 2, 2, 0, 0]
    pieces = DispatchSpec(capacity_factor=1.0, scope="subsequence", subsequence_length=2)
    assert check(index, weight, 2, pieces, (2, 4)).index_TK.flatten().tolist() == [0, 2, 0, 2, 0, 2, 0, 2]


def test_the_ragged_buffer_keeps_the_first_rows_in_expert_order():
    index = torch.tensor([[2, 0], [1, 2], [0, 2]])
    spec = DispatchSpec(ragged_buffer_factor=0.5)  # 3 of 6 rows: both of expert 0, one of expert 1
    got = check(index, torch.ones(3, 2), 3, spec)
    assert got.index_TK.tolist() == [[3, 0], [1, 3], [0, 3]]
    assert got.dropped == 3


def test_ties_go_to_the_earlier_token_and_slot():
    index = torch.zeros(5, 1, dtype=torch.int64)
    spec = DispatchSpec(capacity_factor=0.4, drop_policy="probability")
    assert check(index, torch.ones(5, 1), 1, spec).index_TK.flatten().tolist() == [0, 0, 1, 1, 1]


def test_a_spec_that_drops_nothing_changes_nothing():
    index, weight = routing(7, 2, 4, sentinels=0.2)
    got = drop(index, weight, 4, DispatchSpec())
    assert torch.equal(got.index_TK, index)
    assert got.dropped == 0


@pytest.mark.parametrize("policy", ["position", "probability"])
def test_batch_capacity_is_that_of_the_op_itself(policy):
    E, D, F = 4, 6, 8
    index, weight = routing(17, 2, E, skew=0.2, levels=10**6)
    generator = torch.Generator().manual_seed(1)
    x, w_in, w_out = (torch.randn(*s, generator=generator) for s in ((17, D), (E, F, D), (E, D, F)))
    spec = DispatchSpec(capacity_factor=0.6, drop_policy=policy)
    got = drop(index, weight, E, spec)
    assert got.dropped > 0
    ours = moepass.ops.experts(x, got.index_TK, weight, w_in, w_out, activation="relu")
    inside = ExpertArgs(w_in, w_out, None, None, "relu(g)", capacity_factor=0.6, drop_policy=policy)
    torch.testing.assert_close(ours, lowerings()["capacity"].build(x, index, weight, inside))
    torch.testing.assert_close(ours, lowerings()["capacity"].build(x, got.index_TK, weight, inside))


def test_missing_or_unfit_sequences_are_refused():
    index, weight = routing(6, 2, 4)
    with pytest.raises(errors.NoSequences):
        drop(index, weight, 4, DispatchSpec(capacity_factor=1.0, scope="sequence"))
    uneven = DispatchSpec(capacity_factor=1.0, scope="subsequence", subsequence_length=4)
    with pytest.raises(errors.NotDivisible, match="subsequence_length"):
        drop(index, weight, 4, uneven, (1, 6))


SPECS = {
    "batch": DispatchSpec(capacity_factor=0.7),
    "sequence by probability": DispatchSpec(capacity_factor=0.7, scope="sequence", drop_policy="probability"),
    "subsequence": DispatchSpec(capacity_factor=0.7, scope="subsequence", subsequence_length=2),
    "ragged": DispatchSpec(ragged_buffer_factor=0.6),
}


@pytest.mark.parametrize("case", SPECS)
def test_compiles_in_one_graph_for_many_batches_and_lengths(case):
    spec, graphs = SPECS[case], []

    def counting(gm, inputs):
        graphs.append(gm)
        return torch._dynamo.lookup_backend("aot_eager")(gm, inputs)

    @torch.compile(backend=counting, fullgraph=True, dynamic=True)
    def run(index, weight):
        B, S, K = index.shape
        return drop(index.view(B * S, K), weight.view(B * S, K), 4, spec, (B, S))

    torch._dynamo.reset()
    first = None
    for B, S in ((3, 8), (2, 6), (5, 14)):
        index, weight = routing(B * S, 2, 4, seed=S, skew=0.1)
        got = run(index.view(B, S, 2), weight.view(B, S, 2))
        assert got.index_TK.tolist() == by_hand(index, weight, 4, spec, (B, S))
        first = first or len(graphs)  # dynamic=True may trace twice to specialise floats
    assert len(graphs) == first


@pytest.mark.slow
def test_inductor_gives_the_same_index():
    spec = DispatchSpec(capacity_factor=0.7, scope="sequence", drop_policy="probability", ragged_buffer_factor=0.4)
    index, weight = routing(24, 2, 4, skew=0.1)
    got = torch.compile(drop, fullgraph=True)(index, weight, 4, spec, (3, 8))
    assert got.index_TK.tolist() == by_hand(index, weight, 4, spec, (3, 8))
    assert got.dropped == drop(index, weight, 4, spec, (3, 8)).dropped


def test_works_on_fake_and_meta_tensors():
    index, weight = (t.to("meta") for t in routing(6, 2, 4))
    got = drop(index, weight, 4, DispatchSpec(capacity_factor=1.0, scope="sequence"), (2, 3))
    assert got.index_TK.shape == (6, 2)
    assert got.dropped.shape == ()
