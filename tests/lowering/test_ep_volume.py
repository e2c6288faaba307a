"""Communication volumes and the spread of rows over ranks: by hand, and against routing that is drawn and counted."""

from __future__ import annotations

import math

import pytest
import torch

from moepass.lowering import ep_volume as volume
from moepass.lowering import ranks
from moepass.lowering.links import Link
from moepass.lowering.mesh import MeshDim

FAST = Link(name="fast", bandwidth=1e9, latency=1e-3)
SLOW = Link(name="slow", bandwidth=1e8, latency=1e-2)
NODES, LOCAL = 4, 2
TWO = (MeshDim(name="node", size=NODES, link=SLOW), MeshDim(name="ep", size=LOCAL, link=FAST))
E, K, P = 32, 4, NODES * LOCAL


def draws(tokens: int, exponent: float = 0.0, seed: int = 0) -> torch.Tensor:
    """``[tokens, K]`` distinct experts of each token; popularity is dealt at random."""
    generator = torch.Generator().manual_seed(seed)
    p_E = torch.arange(1, E + 1, dtype=torch.float64) ** -exponent
    p_E = p_E[torch.randperm(E, generator=generator)]
    return torch.multinomial(p_E.expand(tokens, E), K, generator=generator)


def test_all_to_all_volume_is_what_a_counted_exchange_sends():
    """Each row whose expert is elsewhere crosses once: over the outermost dimension at which the ranks differ."""
    own = 2000
    to_TK = torch.cat([draws(own, seed=r) for r in range(P)]) // (E // P)
    sender_T1 = torch.arange(P).repeat_interleave(own).unsqueeze(1)
    other_node = (to_TK // LOCAL != sender_T1 // LOCAL).sum().item() / P
    same_node = ((to_TK // LOCAL == sender_T1 // LOCAL) & (to_TK != sender_T1)).sum().item() / P

    sent = volume.exchange(TWO, float(own * K)).sent

    assert sent == pytest.approx((other_node, same_node), rel=0.02)
    assert sum(sent) == pytest.approx((1 - 1 / P) * own * K), "the lower bound: each row crosses once"


@pytest.mark.parametrize("exponent", [0.0, 1.0])
def test_tokens_reach_as_many_distinct_nodes_as_counted(exponent):
    routing = "random" if exponent == 0 else f"skew={exponent:g}"
    counted = []
    for seed in range(12):
        node_TK = draws(2000, exponent, seed) // (E // NODES)
        counted.append(torch.nn.functional.one_hot(node_TK, NODES).amax(1).sum(1).float().mean().item())
    assert ranks.distinct_groups(E, K, NODES, routing) == pytest.approx(sum(counted) / len(counted), rel=0.04)


def test_distinct_remote_nodes_by_hand():
    """E=4, K=2, two nodes of 2: a pair misses a node with 1/6, so a token reaches the other node with 5/6."""
    assert ranks.remote_groups(4, 2, 2, "random") == pytest.approx(5 / 6)
    assert ranks.remote_groups(8, 8, 4, "random") == 3


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.5])
@pytest.mark.parametrize("tokens", [3, 64, 1000])
def test_busiest_rank_has_as_many_rows_as_counted(tokens, exponent):
    routing = "random" if exponent == 0 else f"skew={exponent:g}"
    counted = []
    for seed in range(60):
        rank_R = draws(tokens, exponent, seed).flatten() // (E // P)
        counted.append(torch.bincount(rank_R, minlength=P).max().item())
    assert ranks.busiest_rows(tokens, E, K, P, routing) == pytest.approx(sum(counted) / len(counted), rel=0.12)


def test_busiest_rank_is_bounded():
    assert ranks.busiest_rows(10, 8, 2, 8, "skew=50") <= 10, "at most min(K, E/P) rows of a token meet on a rank"
    assert ranks.busiest_rows(10, 8, 8, 4, "random") == 20, "all experts: nothing is left to chance"
    assert ranks.busiest_rows(3, 8, 1, 2, "balanced") == 2
    assert ranks.busiest_rows(0, 8, 1, 2, "random") == 0
    assert ranks.imbalance(1 << 20, 64, 8, 8, "random") == pytest.approx(1.0, abs=0.01)


def test_gathers_send_what_every_other_rank_needs():
    way = volume.gather(TWO, 100.0, "all_gather")
    assert way.sent == (300.0, 400.0)
    assert sum(way.sent) == (P - 1) * 100.0
    assert way.latency == pytest.approx(2e-2 + 1e-3)
    assert way.seconds == pytest.approx(way.latency + 300 / 1e8 + 400 / 1e9)


def test_all_reduce_is_a_reduce_scatter_and_an_all_gather():
    assert volume.reduce(TWO[1:], 100.0).sent == (100.0,)
    assert sum(volume.reduce(TWO, 800.0).sent) == 2 * (P - 1) * 100.0


def test_an_exchange_waits_for_the_slowest_link_and_the_busiest_rank():
    way = volume.exchange(TWO, 8e6, peak=2.0)
    assert way.sent == (6e6, 1e6)
    assert way.seconds == pytest.approx(2 * 6e6 / 1e8 + way.latency)
    assert way.cut(4) == pytest.approx(way.latency + 2 * 6e6 / 1e8 / 4)


def test_pipeline_by_hand():
    assert volume.pipeline(1, 2, 5, 3) == 10
    assert volume.pipeline(2, 1, 5, 1) == 1 + 2 * 5 + 1, "experts decide: fill, work, drain"
    assert volume.pipeline(2, 5, 1, 5) == 20, "links decide: both ways of both chunks"
    assert volume.pipeline(3, 0, 2, 0) == 6


@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_pipeline_is_never_shorter_than_its_parts(chunks):
    for dispatch, compute, combine in ((1.0, 2.0, 3.0), (3.0, 1.0, 0.0), (0.5, 9.0, 0.5)):
        seconds = volume.pipeline(chunks, dispatch, compute, combine)
        assert seconds >= max(chunks * (dispatch + combine), dispatch + chunks * compute + combine) - 1e-9
        assert seconds <= chunks * (dispatch + compute + combine) + 1e-9


def test_kernel_notes_distinct_ranks_of_olmoe():
    """reference/kernels.md 2.1: (P-1)(1-C(E-E/P,K)/C(E,K)) for OLMoE on 8 ranks."""
    expected = 7 * (1 - math.comb(56, 8) / math.comb(64, 8))
    assert ranks.remote_groups(64, 8, 8, "random") == pytest.approx(expected)
